// A row of the stream through the final norm and its modulation, by one warp.
#pragma once

#include "cuda/tile/math.cuh"

namespace loopmdm {

constexpr int kRowThreads = 256;

// What the norm before the head needs to know.
struct ModulatedRows {
  const float* hidden;         // [T, D]
  const int64_t* rows;         // [R]
  const float* norm;           // [D]
  const uint16_t* modulation;  // [1 or B, 2, D] bf16: shift, scale
  int32_t num_rows, size, length;
  int32_t modulation_stride;  // to the next sequence, 0: all have one

  // There are less than 2^31 tokens, and a division of 64 bits is a function call.
  __device__ int sequence(int64_t token) const { return static_cast<int>(token) / length; }
  __device__ const uint16_t* shift(int64_t token) const {
    return modulation + static_cast<int64_t>(sequence(token)) * modulation_stride;
  }
};

__device__ inline float4 load_row(const float* row, int column) {
  return __ldg(reinterpret_cast<const float4*>(row + column));
}

__device__ inline float4 load_bf16_row(const uint16_t* row, int column) {
  const uint2 words = __ldg(reinterpret_cast<const uint2*>(row + column));
  const float2 first = unpack_bf16(words.x), second = unpack_bf16(words.y);
  return {first.x, first.y, second.x, second.y};
}

// 1 + scale, rounded to bf16 as the reference model does.
__device__ inline float one_plus(float scale) { return unpack_bf16(pack_bf16(1.0f + scale, 0.0f)).x; }

struct RowMoments {
  float mean, inverse_deviation;

  // In two passes: E[x^2] - E[x]^2 would lose the difference.
  __device__ RowMoments(const float* row, int size) {
    const int lane = threadIdx.x % 32;
    float total = 0;
    for (int column = 4 * lane; column < size; column += 128) {
      const float4 x = load_row(row, column);
      total += x.x + x.y + (x.z + x.w);
    }
    mean = warp_sum(total) / size;
    float left, variance = deviations(left, row, size);
    if (is_nearly_constant(variance, mean)) {
      mean += left;
      variance = deviations(left, row, size);
    }
    inverse_deviation = loopmdm::inverse_deviation(variance);
  }

  // The mean of the squared deviations from the mean; `left` is that of the deviations, 0 but for rounding.
  __device__ float deviations(float& left, const float* row, int size) const {
    float squares = 0, differences = 0;
    for (int column = 4 * (threadIdx.x % 32); column < size; column += 128) {
      const float4 x = load_row(row, column);
      const float a = x.x - mean, b = x.y - mean, c = x.z - mean, d = x.w - mean;
      squares += a * a + b * b + (c * c + d * d);
      differences += a + b + (c + d);
    }
    left = warp_sum(differences) / size;
    return warp_sum(squares) / size;
  }

  __device__ float normalised(float x) const { return (x - mean) * inverse_deviation; }
};

}  // namespace loopmdm
