// Arithmetic on registers that the phases share.
#pragma once

#include "common/fragment.h"
#include "common/row_math.h"
#include "cuda/ptx/numbers.cuh"

namespace loopmdm {

constexpr float kLog2E = 1.4426950408889634f;

// Of the four lanes of a quad.
__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
  }
  return value;
}

template <int kSums>
__device__ void clear(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
}

// x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)): one exponential and no cancellation where tanh is near -1.
__device__ inline float gelu(float x) {
  const float u = 0.7978845608028654f * x * (1.0f + 0.044715f * x * x);
  return __fdividef(x, 1.0f + fast_exp2(-2.0f * kLog2E * u));
}

// See quad_word in common/fragment.h.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
  const int lane = threadIdx.x & 3;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = quad_word(lane, bit, 0) == 0;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? words[low] : words[low | bit], bit);
      if (upper) {
        words[low] = got;
      } else {
        words[low | bit] = got;
      }
    }
  }
}

}  // namespace loopmdm
