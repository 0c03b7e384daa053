// Emulated: see emulator.h.
#pragma once

#include "common/host_device.h"
#include "emulator.h"

namespace loopmdm {

inline float fast_exp2(float x) { return exp2f(x); }

inline float fast_log2(float x) { return log2f(x); }

inline float larger_or_nan(float a, float b) { return a != a || a > b ? a : b; }

inline uint32_t round_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

inline float2 unpack_bf16(uint32_t packed) {
  const uint32_t bits[2] = {packed << 16, packed & 0xFFFF0000u};
  float2 values;
  memcpy(&values, bits, 8);
  return values;
}

inline float2 unpack_half(uint32_t packed) {
  _Float16 values[2];
  memcpy(values, &packed, 4);
  return {static_cast<float>(values[0]), static_cast<float>(values[1])};
}

}  // namespace loopmdm
