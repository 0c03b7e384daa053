// The AMX and AVX512-BF16 instructions that the kernels use, in plain C++ after the pseudo-code of Intel's
// manual, for machines with AVX-512 but without them. Given to the compiler with -include; the kernels then
// compile as for a processor that has them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#define __AVX512BF16__ 1
#define __AMX_BF16__ 1

namespace emulated {

struct Tile {
  int rows, row_bytes;
  uint32_t words[16][16];
};

struct TileUnit {
  Tile tiles[8];
  bool configured;
  int64_t faults, configurations, products;
};

inline thread_local TileUnit unit;

inline float flushed(float x) {
  return __builtin_fabsf(x) < std::numeric_limits<float>::min() ? __builtin_copysignf(0.0f, x) : x;
}

inline float value(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float low_half(uint32_t pair) { return value(pair << 16); }
inline float high_half(uint32_t pair) { return value(pair & 0xffff0000u); }

// Denormal operands and results are zero.
inline float multiply_add(float a, float b, float sum) { return flushed(__builtin_fmaf(a, b, flushed(sum))); }

inline void require(bool condition) {
  if (!condition) ++unit.faults;
}

inline void load_config(const void* memory) {
  uint8_t bytes[64];
  std::memcpy(bytes, memory, sizeof bytes);
  require(bytes[0] == 1 && bytes[1] == 0);
  for (int i = 2; i < 64; ++i)  // reserved, and the second half of both lists
    if (i < 16 || (i >= 32 && i < 48) || i >= 56) require(bytes[i] == 0);
  for (int t = 0; t < 8; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, sizeof row_bytes);
    require(bytes[48 + t] <= 16 && row_bytes <= 64 && (bytes[48 + t] == 0) == (row_bytes == 0));
    unit.tiles[t] = {bytes[48 + t], row_bytes, {}};
  }
  unit.configured = true;
  ++unit.configurations;
}

inline void release() { unit.configured = false; }

inline Tile& used(int t) {
  require(unit.configured && unit.tiles[t].rows > 0);
  return unit.tiles[t];
}

inline void zero(int t) { std::memset(used(t).words, 0, sizeof(Tile::words)); }

inline void load(int t, const void* memory, int64_t stride) {
  Tile& tile = used(t);
  std::memset(tile.words, 0, sizeof tile.words);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.words[r], static_cast<const char*>(memory) + r * stride,
                static_cast<size_t>(tile.row_bytes));
}

inline void store(int t, void* memory, int64_t stride) {
  const Tile& tile = used(t);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<char*>(memory) + r * stride, tile.words[r], static_cast<size_t>(tile.row_bytes));
}

inline void add_products(int sum, int left, int right) {
  Tile& c = used(sum);
  const Tile &a = used(left), &b = used(right);
  require(c.rows == a.rows && a.row_bytes == 4 * b.rows && c.row_bytes == b.row_bytes);
  ++unit.products;
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float low = 0, high = 0;
      for (int k = 0; k < a.row_bytes / 4; ++k) {
        low = multiply_add(low_half(a.words[m][k]), low_half(b.words[k][n]), low);
        high = multiply_add(high_half(a.words[m][k]), high_half(b.words[k][n]), high);
      }
      c.words[m][n] = bits_of(flushed(value(c.words[m][n]) + flushed(low + high)));
    }
}

// VDPBF16PS: the high halves first.
inline __m512 dot_pairs(__m512 sums, __m512i a, __m512i b) {
  uint32_t left[16], right[16];
  std::memcpy(left, &a, sizeof left);
  std::memcpy(right, &b, sizeof right);
  for (int i = 0; i < 16; ++i) {
    const float sum = multiply_add(high_half(left[i]), high_half(right[i]), sums[i]);
    sums[i] = multiply_add(low_half(left[i]), low_half(right[i]), sum);
  }
  return sums;
}

inline uint16_t rounded(float x) {
  if (x != x) return static_cast<uint16_t>(bits_of(x) >> 16 | 0x40);
  const uint32_t bits = bits_of(flushed(x));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __m512bh round_pair(__m512 high, __m512 low) {
  uint16_t halves[32];
  for (int i = 0; i < 16; ++i) {
    halves[i] = rounded(low[i]);
    halves[16 + i] = rounded(high[i]);
  }
  __m512bh out;
  std::memcpy(&out, halves, sizeof out);
  return out;
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, memory, stride) emulated::load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) emulated::store(tile, memory, stride)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_dpbf16ps(sum, left, right) emulated::add_products(sum, left, right)
#define _tile_loadconfig(memory) emulated::load_config(memory)
#define _tile_release() emulated::release()
#define _mm512_dpbf16_ps(sums, a, b) \
  emulated::dot_pairs(sums, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b))
#define _mm512_cvtne2ps_pbh(high, low) emulated::round_pair(high, low)
