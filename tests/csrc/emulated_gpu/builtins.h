// What the language of the kernels has beside C++.
#pragma once

#include "order.h"

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
// By way of L1, which does not see what is stored meanwhile.
template <class T>
T __ldg(const T* address) {
  emulator::load_constant(address, sizeof(T));
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return emulator::load(address);
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float atomicAdd(float* address, float value) {
  const float old = *address;
  *address += value;
  return old;
}
using std::max;
using std::min;

inline emulator::Index threadIdx{{0}}, blockIdx{{1}}, gridDim{{2}};

inline void __syncwarp() { emulator::meet_and_tell(emulator::lanes_at("__syncwarp"), 32); }

inline void __syncthreads() { emulator::meet_at(0, emulator::state->threads); }

// `source`: from which lane a lane takes.
template <class T, class Source>
T exchange_in_warp(T value, Source source) {
  struct Exchange {
    T given, taken;
  } exchange{value, value};
  emulator::meet_in_warp("shfl", &exchange, [source](void** all) {
    for (int lane = 0; lane < 32; ++lane) {
      static_cast<Exchange*>(all[lane])->taken = static_cast<Exchange*>(all[source(lane)])->given;
    }
  });
  return exchange.taken;
}

template <class T>
T __shfl_xor_sync(uint32_t, T value, int distance) {
  return exchange_in_warp(value, [distance](int lane) { return lane ^ distance; });
}

template <class T>
T __shfl_sync(uint32_t, T value, int from) {
  return exchange_in_warp(value, [from](int) { return from; });
}

inline bool __any_sync(uint32_t, bool value) {
  for (int distance = 16; distance > 0; distance /= 2) value |= __shfl_xor_sync(~0u, value, distance);
  return value;
}
