// A row of tokens on its way from one product to the next: statistics, norm, modulation, rotation. Every
// kernel of looped blocks makes these numbers in the same order: the bits do not tell which it was. Where a
// compiler may choose what to round, it is said here.
#pragma once

#include "cuda/tile/math.cuh"
#include "cuda/tile/widths.cuh"

namespace loopmdm {

// Of a row's part, whose columns begin at `batch` times 8 of the sums, by its quad.
template <int kSums>
__device__ PartStatistics part_statistics(const float (&sums)[kSums], int batch, int half, float total) {
  const float mean = quad_sum(total) / Widths::kPart;
  float deviations = 0;
#pragma unroll
  for (int i = 0; i < Widths::kPart / 8; ++i) {
    const float* const pair = &sums[4 * (batch + i) + 2 * half];
    const float first = pair[0] - mean, second = pair[1] - mean;
    deviations += fmaf(first, first, second * second);
  }
  return {mean, quad_sum(deviations)};
}

// The norm of a row as x * scale + offset, from the mean and deviations of its parts, which `load` gets by
// their number. A quad's lanes read a quarter of them each: few tokens wait for this.
template <class Load>
__device__ float2 merged_norm(int lane, const Load& load) {
  constexpr int kOwn = (Widths::kParts + 3) / 4;
  PartSums sums;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int part = kOwn * (lane % 4) + i;
    if (Widths::kParts % 4 && part >= Widths::kParts) continue;
    const float2 values = load(part);
    add_part(sums, {values.x, values.y}, Widths::kPart);
  }
  constexpr bool kWhole = Widths::kParts % 4 == 0;  // all lanes have as many parts
  if (kWhole) sums.parts = kOwn;                    // which the compiler then knows
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    PartSums other;
    other.parts = kWhole ? sums.parts : __shfl_xor_sync(~0u, sums.parts, distance);
    other.mean = __shfl_xor_sync(~0u, sums.mean, distance);
    other.deviations = __shfl_xor_sync(~0u, sums.deviations, distance);
    const bool later = (lane & distance) != 0;
    sums = merge_sums(later ? other : sums, later ? sums : other, Widths::kPart);
  }
  const float scale = inverse_deviation(variance(sums, Widths::kPart));
  return {scale, -sums.mean * scale};
}

// Two columns of a row as words of a left operand.
__device__ inline uint32_t modulated(float2 x, float scale, float offset, float4 vectors) {
  return pack_bf16(fmaf(fmaf(x.x, scale, offset), vectors.x, vectors.z),
                   fmaf(fmaf(x.y, scale, offset), vectors.y, vectors.w));
}

// A pair (i, i + K/2) of a head. Which product is rounded by itself is said: the compiler chose one or the
// other, by what stood around it.
__device__ inline void rotate_pair(float& first, float& second, float cosine, float sine) {
  const float a = first, b = second;
  first = fmaf(a, cosine, -(b * sine));
  second = fmaf(a, sine, b * cosine);
}

// The stream: old + gate * (sum + bias).
__device__ inline float gated(float sum, float old, float gate, float bias) {
  return fmaf(gate, sum + bias, old);
}

}  // namespace loopmdm
