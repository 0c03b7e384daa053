// Attention of 64 queries of one head by one warp group, over blocks of 128 keys. Scores, probabilities and
// sums stay in registers; the exponentials of one warp group run while the other multiplies.
#pragma once

#include "cuda/epilogue_sm90.cuh"

namespace loopmdm {

namespace attention_tile {

constexpr int kKeys = Config::kKeyBlock, kHeadDim = Config::kHeadDim;

// The queries as left operand: a stage is free again at once.
__device__ inline void load_queries(uint32_t (&queries)[kHeadDim / 16][4], uint32_t panels,
                                    const Seat& seat) {
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const uint32_t offset =
          panel_offset(seat.row + 8 * (reg & 1), 16 * k + operand_column(seat.thread, reg), Config::kRows, 2);
      queries[k][reg] = load_shared(panels + offset);
    }
  }
}

// Scores of keys that may not be attended become minus infinity.
__device__ inline void mask_scores(float (&scores)[kKeys / 2], const uint8_t* key_mask, int first_key,
                                   int length, const Seat& seat) {
#pragma unroll
  for (int group = 0; group < kKeys / 8; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = first_key + seat.column(4 * group + i);
      const bool seen = key < length && (!key_mask || __ldg(key_mask + key) != 0);
      if (!seen) scores[4 * group + i] = scores[4 * group + 2 + i] = -LOOPMDM_INFINITY;
    }
  }
}

// Largest score and sum of the exponentials of the thread's two rows; the sum is over its own columns.
struct Running {
  float top[2] = {-LOOPMDM_INFINITY, -LOOPMDM_INFINITY}, sum[2] = {0, 0};
};

// exp(score - top) of a block, rounded, as left operand; brings sums and `mixed` to the new maxima.
__device__ inline void exponentials(float (&scores)[kKeys / 2], uint32_t (&weights)[kKeys / 16][4],
                                    Running& running, float (&mixed)[kHeadDim / 2], float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = running.top[half];
#pragma unroll
    for (int group = 0; group < kKeys / 8; ++group) {
      top = fmaxf(top, fmaxf(scores[4 * group + 2 * half], scores[4 * group + 2 * half + 1]));
    }
    top = quad_max(top);
    // Of a row without keys so far, all differences would be infinity minus infinity.
    const float base = top == -LOOPMDM_INFINITY ? 0.0f : top * scale;
    const float shrink = fast_exp2(running.top[half] * scale - base);
    running.top[half] = top;
    running.sum[half] *= shrink;
#pragma unroll
    for (int group = 0; group < kHeadDim / 8; ++group) {
      mixed[4 * group + 2 * half] *= shrink;
      mixed[4 * group + 2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int group = 0; group < kKeys / 8; ++group) {
      const float a = fast_exp2(scores[4 * group + 2 * half] * scale - base);
      const float b = fast_exp2(scores[4 * group + 2 * half + 1] * scale - base);
      running.sum[half] += a + b;
      weights[group / 2][2 * (group & 1) + half] = pack_bf16(a, b);
    }
  }
}

}  // namespace attention_tile

__device__ inline void attention(const Parameters& p, const Instruction& item, const Ring& ring,
                                 RingPlace& place, const Seat& seat) {
  using namespace attention_tile;
  const int head = item.column * Config::kHeadsPerTile + seat.column_group;
  const uint32_t panel = seat.column_group * (kHeadDim / 64);  // of the heads in a stage
  const uint8_t* const key_mask = p.key_mask ? p.key_mask + p.token(item.sequence, 0) : nullptr;
  const float scale = kLog2E * rsqrtf(static_cast<float>(kHeadDim));

  uint32_t queries[kHeadDim / 16][4];
  ring.wait_full(place);
  load_queries(queries, ring.stage(place.slot) + panel * Config::kRows * 128, seat);
  ring.release(place);
  advance(place, Config::kStages);

  float mixed[kHeadDim / 2] = {};
  Running running;
#pragma unroll 1
  for (int key = 0; key < p.length; key += kKeys) {
    float scores[kKeys / 2];
    ring.wait_full(place);
    const uint32_t keys = ring.stage(place.slot) + panel * kKeys * 128;
    products_begin();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      WarpGroupProduct<kKeys>::template registers<false>(
          scores, queries[k], inner_major_descriptor(keys + k / 4 * kKeys * 128, k % 4), k > 0);
    }
    products_commit();
    products_wait<0>();
    pin(scores);
    ring.release(place);
    advance(place, Config::kStages);

    if (key_mask || key + kKeys > p.length) mask_scores(scores, key_mask, key, p.length, seat);
    uint32_t weights[kKeys / 16][4];
    exponentials(scores, weights, running, mixed, scale);

    ring.wait_full(place);
    const uint32_t values = ring.stage(place.slot) + panel * kKeys * 128;
    products_begin();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      WarpGroupProduct<kHeadDim>::template registers<true>(
          mixed, weights[k], outer_major_descriptor(values, kKeys * 128, k), true);
    }
    products_commit();
    products_wait<0>();
    pin(mixed);
    ring.release(place);
    advance(place, Config::kStages);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float share = 1.0f / quad_sum(running.sum[half]);
#pragma unroll
    for (int group = 0; group < kHeadDim / 8; ++group) {
      mixed[4 * group + 2 * half] *= share;
      mixed[4 * group + 2 * half + 1] *= share;
    }
  }
  store_bf16<kHeadDim>(mixed, p.mixed_values, Config::kHidden, head * kHeadDim, p, item,
                       p.token(item.sequence, 0), seat);
}

}  // namespace loopmdm
