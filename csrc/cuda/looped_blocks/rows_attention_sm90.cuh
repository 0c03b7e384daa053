// Attention of the block's eight tokens over all keys of the sequence, which lie in its shared memory. Scores
// are keys times queries, means are values times weights, of a panel's heads together; the groups of warps
// share the panels. The bits are those of attention_sm90.cuh.
#pragma once

#include "cuda/looped_blocks/rows_product_sm90.cuh"

namespace loopmdm {

namespace looped_rows {

class Attention {
  using Scores = float[kHeads][kKeyTiles][4];

 public:
  // Which keys of a sequence a thread may attend to: a bit for each two of its scores.
  __device__ static uint32_t seen_keys(const KernelParameters& p, const Seat& seat, int sequence) {
    const uint8_t* const mask = p.key_mask ? p.key_mask + static_cast<int64_t>(sequence) * p.length : nullptr;
    uint32_t seen = 0;
#pragma unroll
    for (int i = 0; i < 2 * kKeyTiles; ++i) {
      const int key = 64 * (i / 2) + seat.row(2 * (i % 2));
      if (key < p.length && (!mask || __ldg(mask + key) != 0)) seen |= 1u << i;
    }
    return seen;
  }

  __device__ Attention(uint32_t base, const Seat& seat, uint32_t seen)
      : base_(base), seat_(seat), seen_(seen) {}

  // Leaves the weighted means, rounded, as right operand. Values need not be there before `wait_for_values`.
  template <class Wait>
  __device__ void run(const Wait& wait_for_values) const {
#pragma unroll 1
    for (int panel = seat_.group; panel < kPanels; panel += kGroups) {
      Scores scores;
      score(scores, panel);
      mask(scores);
      float2 largest[kHeads];
      find_largest(scores, largest);
      weigh(scores, largest);
      shared_proxy_fence();
      seat_.meet_group();
      wait_for_values();
      mix(panel);
    }
  }

 private:
  static constexpr int kHeadSteps = kHeadDim / 16;

  __device__ void score(Scores& scores, int panel) const {
    const uint32_t keys = base_ + Places::keys + panel * kKeys * 128;
    const uint32_t queries = base_ + Places::queries + panel * kRows * 128;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
#pragma unroll
      for (int tile = 0; tile < kKeyTiles; ++tile) clear(scores[head][tile]);
    }
    products_begin(scores);
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
#pragma unroll
      for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
        for (int k = 0; k < kHeadSteps; ++k) {
          const int step = head * kHeadSteps + k;
          WarpGroupProduct<kRows>::template shared<>(scores[head][tile],
                                                     inner_major_descriptor(keys + tile * 64 * 128, step),
                                                     inner_major_descriptor(queries, step), k > 0);
        }
      }
    }
    products_commit();
    products_wait<0>();
    pin(scores);
  }

  // What lies behind the last key is anything.
  __device__ void mask(Scores& scores) const {
#pragma unroll
    for (int i = 0; i < 2 * kKeyTiles; ++i) {
      const bool seen = (seen_ >> i & 1) != 0;
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        float* const of_key = scores[head][i / 2] + 2 * (i % 2);
        of_key[0] = seen ? of_key[0] : -LOOPMDM_INFINITY;
        of_key[1] = seen ? of_key[1] : -LOOPMDM_INFINITY;
      }
    }
  }

  __device__ uint32_t largest_at(int warp, int head) const {
    return base_ + Places::largest +
           4 * (((4 * seat_.group + warp) * kHeads + head) * kRows + seat_.token(0));
  }

  // Of the thread's two tokens, over all keys; 0 of a token without keys, whose differences would be infinity
  // minus infinity.
  __device__ void find_largest(const Scores& scores, float2 (&largest)[kHeads]) const {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      float2 own = make_float2(-LOOPMDM_INFINITY, -LOOPMDM_INFINITY);
#pragma unroll
      for (int tile = 0; tile < kKeyTiles; ++tile) {
        const float* const of_keys = scores[head][tile];
        own.x = fmaxf(own.x, fmaxf(of_keys[0], of_keys[2]));
        own.y = fmaxf(own.y, fmaxf(of_keys[1], of_keys[3]));
      }
#pragma unroll
      for (int distance = 4; distance <= 16; distance *= 2) {
        own.x = fmaxf(own.x, __shfl_xor_sync(~0u, own.x, distance));
        own.y = fmaxf(own.y, __shfl_xor_sync(~0u, own.y, distance));
      }
      if (seat_.thread % 32 < 4) store_shared_pair(largest_at(seat_.warp(), head), own);
    }
    seat_.meet_group();
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      float2 all = load_shared_pair(largest_at(0, head));
#pragma unroll
      for (int warp = 1; warp < 4; ++warp) {
        const float2 other = load_shared_pair(largest_at(warp, head));
        all.x = fmaxf(all.x, other.x);
        all.y = fmaxf(all.y, other.y);
      }
      largest[head].x = all.x == -LOOPMDM_INFINITY ? 0.0f : all.x;
      largest[head].y = all.y == -LOOPMDM_INFINITY ? 0.0f : all.y;
    }
  }

  __device__ uint32_t weights() const { return base_ + Places::wide + seat_.group * kWeightBytes; }

  // Sums of the weights of a token's keys 2 i and 2 i + 1 of each eight.
  __device__ uint32_t sums_at(int head, int token, int i) const {
    return base_ + Places::sums + 4 * (((seat_.group * kHeads + head) * kRows + token) * 4 + i) * kSumPitch;
  }

  // exp(score - largest), rounded, as right operand.
  __device__ void weigh(const Scores& scores, const float2 (&largest)[kHeads]) const {
    const float scale = kLog2E * rsqrtf(static_cast<float>(kHeadDim));
    const int token = seat_.pair_token();
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
#pragma unroll
      for (int tile = 0; tile < kKeyTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const float* const of_key = scores[head][tile] + i;
          const float2 pair = in_pairs(fast_exp2((of_key[0] - largest[head].x) * scale),
                                       fast_exp2((of_key[1] - largest[head].y) * scale));
          const int key = 64 * tile + seat_.pair_row(i);
          store_operand(weights(), kHeads * kRows, head * kRows + token, key, pack_bf16(pair.x, pair.y));
          store_shared_float(sums_at(head, token, key % 8 / 2) + 4 * (key / 8), pair.x + pair.y);
        }
      }
    }
  }

  __device__ uint32_t share_at(int head, int token) const {
    return base_ + Places::shares + 4 * ((seat_.group * kHeads + head) * kRows + token);
  }

  __device__ void mix(int panel) const {
    constexpr int kColumns = kHeads * kRows;
    const uint32_t values = base_ + Places::values + panel * kKeys * 128;
    float mixed[4 * kHeads];
    clear(mixed);
    products_begin(mixed);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      WarpGroupProduct<kColumns>::template shared<true, false>(
          mixed, outer_major_descriptor(values, kKeys * 128, k),
          inner_major_descriptor(weights() + k / 4 * kColumns * 128, k % 4), k > 0);
    }
    products_commit();
    if (seat_.warp() < kHeads) add_up(seat_.warp());
    products_wait<0>();
    pin(mixed);
    seat_.meet_group();

    const int own = 16 * seat_.warp() / kHeadDim;  // of all heads' means the thread has this one's features
    const float2 share = load_shared_pair(share_at(own, seat_.token(0)));
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      if (head != own) continue;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 pair = in_pairs(mixed[4 * head + i] * share.x, mixed[4 * head + i + 1] * share.y);
        store_operand(base_ + Places::rows, kRows, seat_.pair_token(), 64 * panel + seat_.pair_row(i),
                      pack_bf16(pair.x, pair.y));
      }
    }
  }

  // What a token's means are to be multiplied by; a warp a head, four lanes a token.
  __device__ void add_up(int head) const {
    const int lane = seat_.thread % 32, token = lane / 4;
    const uint32_t sums = sums_at(head, token, lane % 4);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kSumGroups; ++i) sum += __uint_as_float(load_shared(sums + 4 * i));
    sum = quad_sum(sum);
    if (lane % 4 == 0) store_shared_float(share_at(head, token), 1.0f / sum);
  }

  const uint32_t base_;
  const Seat& seat_;
  const uint32_t seen_;
};

}  // namespace looped_rows

}  // namespace loopmdm
