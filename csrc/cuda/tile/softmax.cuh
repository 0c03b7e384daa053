// The softmax of attention over blocks of keys, on scores in registers.
#pragma once

#include "cuda/tile/rows.cuh"

namespace loopmdm {

namespace attention_tile {

constexpr int kKeys = Config::kKeyBlock, kHeadDim = Config::kHeadDim;

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
  float largest[2] = {-LOOPMDM_INFINITY, -LOOPMDM_INFINITY}, sum[2] = {0, 0};
};

// exp(score - largest) of a block, rounded, as left operand; brings sums and `mixed` to the new maxima.
__device__ inline void exponentials(float (&scores)[kKeys / 2], uint32_t (&weights)[kKeys / 16][4],
                                    Running& running, float (&mixed)[kHeadDim / 2], float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = running.largest[half];
#pragma unroll
    for (int group = 0; group < kKeys / 8; ++group) {
      largest = fmaxf(largest, fmaxf(scores[4 * group + 2 * half], scores[4 * group + 2 * half + 1]));
    }
    largest = quad_max(largest);
    // Of a row without keys so far, all differences would be infinity minus infinity. The difference is taken
    // first: scaled scores are off by their rounding, and of large ones the largest would not come out as 0.
    const float base = largest == -LOOPMDM_INFINITY ? 0.0f : largest;
    const float shrink = fast_exp2((running.largest[half] - base) * scale);
    running.largest[half] = largest;
    running.sum[half] *= shrink;
#pragma unroll
    for (int group = 0; group < kHeadDim / 8; ++group) {
      mixed[4 * group + 2 * half] *= shrink;
      mixed[4 * group + 2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int group = 0; group < kKeys / 8; ++group) {
      const float a = fast_exp2((scores[4 * group + 2 * half] - base) * scale);
      const float b = fast_exp2((scores[4 * group + 2 * half + 1] - base) * scale);
      running.sum[half] += a + b;
      weights[group / 2][2 * (group & 1) + half] = pack_bf16(a, b);
    }
  }
}

// The weighted mean of the values, for the thread's share of rows and columns.
__device__ inline void divide_by_sums(float (&mixed)[kHeadDim / 2], const Running& running) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float share = 1.0f / quad_sum(running.sum[half]);
#pragma unroll
    for (int group = 0; group < kHeadDim / 8; ++group) {
      mixed[4 * group + 2 * half] *= share;
      mixed[4 * group + 2 * half + 1] *= share;
    }
  }
}

}  // namespace attention_tile

}  // namespace loopmdm
