// Vectors of kLanes floats with the operators of the compiler's vector types, and the few operations that
// need an instruction by name. Included once per instruction set, inside an anonymous namespace.
#pragma once

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint64_t Quads __attribute__((vector_size(4 * kLanes)));  // kLanes / 2 values

inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// kLanes bf16 values, widened.
inline Floats widen(const void* p) {
#if defined(__AVX512F__)  // by name: GCC 12 would do each half alone
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  const Words words = __builtin_convertvector(h, Words);
#endif
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(words) << 16);
}

inline Floats load(const uint16_t* p) { return widen(p); }

inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

// Values of bf16: rounded to nearest, ties to even.
inline Floats round_to_bf16(Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return reinterpret_cast<Floats>(v == v ? rounded : Words{} + 0x7fc00000u);
}

// kLanes values as bf16.
inline void store_bf16(uint16_t* p, Floats v) {
  const Halves h = __builtin_convertvector(reinterpret_cast<Words>(round_to_bf16(v)) >> 16, Halves);
  __builtin_memcpy(p, &h, sizeof h);
}

inline Floats broadcast(float x) { return x - Floats{}; }

// a > b ? a : b, so b where either is NaN.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// y in the lanes whose word is at least `threshold`, 0 elsewhere.
inline Floats keep_lanes(Words words, uint32_t threshold, Floats y) {
  return words >= Words{} + threshold ? y : Floats{};
}

// Combines the lanes by halving, always in the same order.
inline float sum_four(Four v) { return (v[0] + v[2]) + (v[1] + v[3]); }

inline float largest_of_four(Four v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}

#if defined(__AVX512F__)

inline float sum_lanes(Floats v) {
  const __m256 eight = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
  return sum_four(_mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1));
}

inline float largest_lane(Floats v) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return largest_of_four(_mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

// Product of the low 32 bits of each 64-bit lane.
inline Quads multiply_low(Quads a, Quads b) {
  return reinterpret_cast<Quads>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

// Bit i: not a[i] <= b[i]; set where either is NaN.
inline uint32_t lanes_not_at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }

inline uint32_t lanes_below(Words a, uint32_t b) {
  return _mm512_cmplt_epu32_mask(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(static_cast<int>(b)));
}

// a0 b0 a1 b1 ..., in two vectors.
inline void interleave(Words& a, Words& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512i va = reinterpret_cast<__m512i>(a), vb = reinterpret_cast<__m512i>(b);
  a = reinterpret_cast<Words>(_mm512_permutex2var_epi32(va, low, vb));
  b = reinterpret_cast<Words>(_mm512_permutex2var_epi32(va, high, vb));
}

// a0 b0 a1 b1 ...
inline void store_interleaved(uint32_t* p, Quads a, Quads b) {
  const __m512i va = reinterpret_cast<__m512i>(a), vb = reinterpret_cast<__m512i>(b);
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64(va, low, vb));
  _mm512_storeu_si512(p + kLanes, _mm512_permutex2var_epi64(va, high, vb));
}

#elif defined(__AVX2__)

inline float sum_lanes(Floats v) { return sum_four(_mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1)); }

inline float largest_lane(Floats v) {
  return largest_of_four(_mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}

inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

inline Quads multiply_low(Quads a, Quads b) {
  return reinterpret_cast<Quads>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

inline uint32_t lanes_not_at_most(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}

inline uint32_t lanes_below(Words a, uint32_t b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(a < b)));
}

inline void interleave(Words& a, Words& b) {
  const __m256i va = reinterpret_cast<__m256i>(a), vb = reinterpret_cast<__m256i>(b);
  const __m256i low = _mm256_unpacklo_epi32(va, vb), high = _mm256_unpackhi_epi32(va, vb);
  a = reinterpret_cast<Words>(_mm256_permute2x128_si256(low, high, 0x20));
  b = reinterpret_cast<Words>(_mm256_permute2x128_si256(low, high, 0x31));
}

inline void store_interleaved(uint32_t* p, Quads a, Quads b) {
  const __m256i va = reinterpret_cast<__m256i>(a), vb = reinterpret_cast<__m256i>(b);
  const __m256i low = _mm256_unpacklo_epi64(va, vb), high = _mm256_unpackhi_epi64(va, vb);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), _mm256_permute2x128_si256(low, high, 0x31));
}

#else

inline float sum_lanes(Floats v) { return sum_four(v); }

inline float largest_lane(Floats v) { return largest_of_four(v); }

#  if defined(__aarch64__)
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) {
  return reinterpret_cast<Floats>(vfmaq_f32(
      reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
}
#  else
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#  endif

inline Quads multiply_low(Quads a, Quads b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }

inline uint32_t lanes_not_at_most(Floats a, Floats b) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(!(a[i] <= b[i])) << i;
  return bits;
}

inline uint32_t lanes_below(Words a, uint32_t b) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] < b) << i;
  return bits;
}

inline void interleave(Words& a, Words& b) {
  const Words low = {a[0], b[0], a[1], b[1]}, high = {a[2], b[2], a[3], b[3]};
  a = low;
  b = high;
}

inline void store_interleaved(uint32_t* p, Quads a, Quads b) {
  for (int i = 0; i < kLanes / 2; ++i) {
    const uint64_t first = a[i], second = b[i];
    __builtin_memcpy(p + 4 * i, &first, sizeof first);
    __builtin_memcpy(p + 4 * i + 2, &second, sizeof second);
  }
}

#endif

// Rows become columns: interleaving the halves of the rows doubles the piece of a column that lies together.
inline void transpose(Words (&m)[kLanes]) {
  for (int piece = 1; piece < kLanes; piece *= 2) {
    Words next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = m[i];
      next[2 * i + 1] = m[i + kLanes / 2];
      interleave(next[2 * i], next[2 * i + 1]);
    }
    for (int i = 0; i < kLanes; ++i) m[i] = next[i];
  }
}
