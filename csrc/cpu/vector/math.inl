// Elementwise functions of vectors, as accurate as the operands they feed: to fp32 rounding for Fp32, well
// below bf16 rounding for Bf16.
#pragma once

#include "cpu/vector/vec.h"

// 2^f on [-1/2, 1/2]; coefficients minimise the largest relative error: 7.5e-5, and 1.9e-9 before rounding.
inline Floats exp2_fraction(Floats f, bool coarse) {
  if (coarse) {
    Floats y = broadcast(0.0551716685f);
    y = fused_multiply_add(y, f, broadcast(0.242611125f));
    y = fused_multiply_add(y, f, broadcast(0.693260968f));
    return fused_multiply_add(y, f, broadcast(0.999928057f));
  }
  Floats y = broadcast(1.53458124e-4f);
  y = fused_multiply_add(y, f, broadcast(1.33999309e-3f));
  y = fused_multiply_add(y, f, broadcast(9.61848907e-3f));
  y = fused_multiply_add(y, f, broadcast(5.55032864e-2f));
  y = fused_multiply_add(y, f, broadcast(0.240226462f));
  y = fused_multiply_add(y, f, broadcast(0.693147182f));
  return fused_multiply_add(y, f, broadcast(1.0f));
}

// 2^x for -126 <= x <= 126.
inline Floats exp2_in_range(Floats x, bool coarse) {
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer
  const Floats shifted = x + magic;
  const Floats y = exp2_fraction(x - (shifted - magic), coarse);
  const Words power = reinterpret_cast<Words>(shifted) << 23;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(y) + power);
}

#if defined(__AVX512F__)
// 2^x for every x, in five instructions: the polynomial on [0, 1), relative error 1e-4.
inline Floats exp2_scaled(Floats x) {
  const Floats f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  Floats y = broadcast(0.0780245215f);
  y = fused_multiply_add(y, f, broadcast(0.226067156f));
  y = fused_multiply_add(y, f, broadcast(0.695833564f));
  y = fused_multiply_add(y, f, broadcast(0.999925196f));
  return _mm512_scalef_ps(y, x);
}
#endif

// 1 / (1 + 2^x)
inline Floats falling_sigmoid2(Floats x, bool coarse) {
#if defined(__AVX512F__)
  if (coarse) return _mm512_rcp14_ps(exp2_scaled(x) + 1.0f);
#endif
  const Floats limit = broadcast(126.0f);
  const Floats bounded = x > limit ? limit : (x < -limit ? -limit : x);
  return 1.0f / (exp2_in_range(bounded, coarse) + 1.0f);
}

// gelu(u), tanh form: u / (1 + 2^-x), where x = 2 sqrt(2/pi) (u + 0.044715 u^3) log2(e).
constexpr float kGeluLinear = 2.30220819f;  // 2 sqrt(2/pi) log2(e)
constexpr float kGeluCubic = 0.102943240f;  // 0.044715 of it

inline Floats gelu(Floats u, bool coarse) {
  const Floats slope = fused_multiply_add(u * u, broadcast(-kGeluCubic), broadcast(-kGeluLinear));
  return u * falling_sigmoid2(u * slope, coarse);
}

// Also gelu'(u) = s + u s (1 - s) 2 sqrt(2/pi) (1 + 3 * 0.044715 u^2) with the sigmoid s.
inline Floats gelu_with_slope(Floats u, bool coarse, Floats& slope) {
  constexpr float kLn2 = 0.693147181f;
  const Floats square = u * u;
  const Floats exponent = u * fused_multiply_add(square, broadcast(-kGeluCubic), broadcast(-kGeluLinear));
  const Floats s = falling_sigmoid2(exponent, coarse), value = u * s;
  const Floats inner =
      fused_multiply_add(square, broadcast(3 * kLn2 * kGeluCubic), broadcast(kLn2 * kGeluLinear));
  slope = fused_multiply_add(value * (1.0f - s), inner, s);
  return value;
}

// Mean and reciprocal standard deviation of the first `width` of `padded` values; the rest are zero.
struct RowMoments {
  float mean, scale;
};

inline RowMoments row_moments(const float* x, int64_t width, int64_t padded) {
  Floats sum = {};
  for (int64_t i = 0; i < padded; i += kLanes) sum += load(x + i);
  const float size = static_cast<float>(width);
  float mean = sum_lanes(sum) / size;
  const auto deviations = [&](float& total, float& left) {
    Floats squares = {}, differences = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const Floats d = load(x + i) - mean;
      squares = fused_multiply_add(d, d, squares);
      differences += d;
    }
    total = sum_lanes(squares);
    left = sum_lanes(differences);
    for (; i < width; ++i) {
      total += (x[i] - mean) * (x[i] - mean);
      left += x[i] - mean;
    }
  };
  float total, left;
  deviations(total, left);
  if (is_nearly_constant(total / size, mean)) {
    mean += left / size;
    deviations(total, left);
  }
  return {mean, inverse_deviation(total / size)};
}
