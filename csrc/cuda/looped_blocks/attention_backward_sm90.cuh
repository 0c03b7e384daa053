// Attention of the backward pass: once more forward, with its log-sum-exp, and gradients of 128 queries or of
// 128 keys and values of a head. Both make the scores again. One is the other with queries and keys
// exchanged: the tile's own rows are kept as left operands, the others come through the ring, and what a
// block of probabilities is multiplied with is the block they came from, read across.
#pragma once

#include "cuda/looped_blocks/attention_sm90.cuh"
#include "cuda/looped_blocks/backward_epilogue_sm90.cuh"

namespace loopmdm {

namespace backward {

constexpr int kHeadDim = Config::kHeadDim;
// Of a block of 64 rows, how many are columns of scores at a time. Two gradients, or one of a head of 128,
// leave registers for no more.
template <bool kOfKeys>
constexpr int kScoreColumns = kOfKeys || kHeadDim == 128 ? 32 : 64;

__device__ inline float score_scale() { return rsqrtf(static_cast<float>(kHeadDim)); }

__device__ __forceinline__ void attention(const Parameters& p, const Instruction& item, const Ring& ring,
                                          RingPlace& place, const Seat& seat) {
  using namespace attention_tile;
  attend(p, item, ring, place, seat, [&](float (&mixed)[kHeadDim / 2], const Running& running) {
    float* const log_sum_exp = p.log_sum_exp + p.head_rows(item, item.column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = item.row * Config::kTileRows + seat.row + 8 * half;
      const float value =
          running.largest[half] * score_scale() * kLog2E + fast_log2(quad_sum(running.sum[half]));
      // Of a row beyond the sequence every probability is 0.
      if (seat.thread % 4 == 0) store(log_sum_exp + row, row < p.length ? value : LOOPMDM_INFINITY);
    }
    divide_by_sums(mixed, running);
    store_bf16<kHeadDim>(mixed, p.mixed_values, Config::kHidden, item.column * kHeadDim, p, item,
                         p.first_token(item), seat);
  });
}

// Probabilities from scores and gradients of scores from those of probabilities, both rounded as left
// operands. `log_sum_exp` and `inner` belong to queries, which are rows, or with kOfKeys columns.
template <bool kOfKeys>
struct ScoreGradient {
  static constexpr int kSpan = kScoreColumns<kOfKeys>;
  const Parameters& p;
  const uint8_t* key_mask;
  const float* log_sum_exp;
  const float* inner;
  float own_log_sum_exp[2], own_inner[2];
  bool own_seen[2];

  __device__ ScoreGradient(const Parameters& parameters, const Instruction& item, const Seat& seat)
      : p(parameters) {
    key_mask = p.key_mask ? p.key_mask + p.token(item.sequence, 0) : nullptr;
    log_sum_exp = p.log_sum_exp + p.head_rows(item, item.column);
    inner = p.inner + p.head_rows(item, item.column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = item.row * Config::kTileRows + seat.row + 8 * half;
      if (kOfKeys) {
        own_seen[half] = seen(row);
      } else {
        own_log_sum_exp[half] = __ldcg(log_sum_exp + row);
        own_inner[half] = __ldcg(inner + row);
      }
    }
  }

  __device__ bool seen(int key) const { return key < p.length && (!key_mask || __ldg(key_mask + key) != 0); }

  __device__ void operator()(const float (&scores)[kSpan / 2], const float (&products)[kSpan / 2],
                             uint32_t (&weights)[kSpan / 16][4], uint32_t (&gradients)[kSpan / 16][4],
                             int first, const Seat& seat) const {
    const float scale = score_scale() * kLog2E;
#pragma unroll
    for (int group = 0; group < kSpan / 8; ++group) {
      const int column = first + seat.column(4 * group);
      float2 column_log_sum_exp{}, column_inner{};
      bool column_seen[2] = {true, true};
      if (kOfKeys) {
        column_log_sum_exp = load_pair(log_sum_exp + column);
        column_inner = load_pair(inner + column);
      } else {
        column_seen[0] = seen(column);
        column_seen[1] = seen(column + 1);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float weight[2], gradient[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int index = 4 * group + 2 * half + i;
          const bool counts = kOfKeys ? own_seen[half] : column_seen[i];
          const float largest =
              kOfKeys ? (i ? column_log_sum_exp.y : column_log_sum_exp.x) : own_log_sum_exp[half];
          const float taken = kOfKeys ? (i ? column_inner.y : column_inner.x) : own_inner[half];
          // Of large scores the difference is rounding and may be above 0, which no weight's logarithm is.
          weight[i] = counts ? fast_exp2(fminf(scores[index] * scale - largest, 0.0f)) : 0.0f;
          gradient[i] = weight[i] * (products[index] - taken);
        }
        weights[group / 2][2 * (group & 1) + half] = pack_bf16(weight[0], weight[1]);
        gradients[group / 2][2 * (group & 1) + half] = pack_bf16(gradient[0], gradient[1]);
      }
    }
  }
};

// Rows of a kept operand times kSpan rows of a stage, over the head.
template <int kSpan>
__device__ inline void multiply_heads(float (&sums)[kSpan / 2], const Kept& kept, int operand, uint32_t rows,
                                      const Seat& seat) {
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    WarpGroupProduct<kSpan>::template shared<false, false>(
        sums, inner_major_descriptor(kept.panel(operand, k / 4, seat.row_group), k % 4),
        inner_major_descriptor(rows + k / 4 * kPanelBytes, k % 4), k > 0);
  }
}

// kSpan columns of scores times as many rows of a stage.
template <int kSpan>
__device__ inline void add_products(float (&sums)[kHeadDim / 2], const uint32_t (&scores)[kSpan / 16][4],
                                    uint32_t rows) {
#pragma unroll
  for (int k = 0; k < kSpan / 16; ++k) {
    WarpGroupProduct<kHeadDim>::template registers<true>(sums, scores[k],
                                                         outer_major_descriptor(rows, kPanelBytes, k), true);
  }
}

template <bool kOfKeys>
__device__ __forceinline__ void attention_gradient(const Parameters& p, const Instruction& item,
                                                   const Ring& ring, RingPlace& place, const Kept& kept,
                                                   RingPlace& kept_place, const Seat& seat) {
  constexpr int kSpan = kScoreColumns<kOfKeys>;
  const ScoreGradient<kOfKeys> score_gradient(p, item, seat);
  float first[kHeadDim / 2] = {};                 // of queries or keys
  float second[kOfKeys ? kHeadDim / 2 : 1] = {};  // of values
  barrier_wait(kept.full(), kept_place.round);
#pragma unroll 1
  for (int block = 0; block < p.length; block += 64) {
    ring.wait_full(place);
    const uint32_t stage = ring.stage(place);
#pragma unroll 1
    for (int span = 0; span < 64; span += kSpan) {
      // Cleared for the reason that product_sm90.cuh gives.
      float scores[kSpan / 2] = {}, products[kSpan / 2] = {};
      products_begin(scores, products);
      multiply_heads<kSpan>(scores, kept, 0, stage + span * 128, seat);
      multiply_heads<kSpan>(products, kept, 1, stage + kHeadPanels * kPanelBytes + span * 128, seat);
      products_commit();
      products_wait<0>();
      pin(scores);
      pin(products);
      uint32_t weights[kSpan / 16][4], gradients[kSpan / 16][4];
      score_gradient(scores, products, weights, gradients, block + span, seat);
      if constexpr (kOfKeys) {
        products_begin(first, second, weights, gradients);
      } else {
        products_begin(first, gradients);
      }
      add_products<kSpan>(first, gradients, stage + span * 128);
      if constexpr (kOfKeys) {
        add_products<kSpan>(second, weights, stage + kHeadPanels * kPanelBytes + span * 128);
      }
      products_commit();
      products_wait<0>();
      pin(first);
      if constexpr (kOfKeys) pin(second);
    }
    ring.release(place);
    Ring::next(place);
  }
  kept.release();
  advance(kept_place, 1);
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) first[i] *= score_scale();
  if (p.cosines) rotate<kHeadDim, true>(first, p, item, seat);
  const int column = (kOfKeys ? Config::kHidden : 0) + item.column * kHeadDim;
  store_bf16<kHeadDim>(first, p.grad_qkv_values, 3 * Config::kHidden, column, p, item, p.first_token(item),
                       seat);
  if constexpr (kOfKeys) {
    store_bf16<kHeadDim>(second, p.grad_qkv_values, 3 * Config::kHidden, Config::kHidden + column, p, item,
                         p.first_token(item), seat);
  }
}

}  // namespace backward

}  // namespace loopmdm
