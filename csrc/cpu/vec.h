// Vectors of kLanes floats with the operators of the compiler's vector types, and the few operations that
// need an instruction by name. Included once per instruction set, inside an anonymous namespace.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
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
inline Floats load(const uint16_t* p) {
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return reinterpret_cast<Floats>(__builtin_convertvector(h, Words) << 16);
}

inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float sum_lanes(Floats v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

inline float largest_lane(Floats v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

#if defined(__AVX512F__)

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

// a0 b0 a1 b1 ...
inline void store_interleaved(uint32_t* p, Quads a, Quads b) {
  const __m512i va = reinterpret_cast<__m512i>(a), vb = reinterpret_cast<__m512i>(b);
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64(va, low, vb));
  _mm512_storeu_si512(p + kLanes, _mm512_permutex2var_epi64(va, high, vb));
}

#elif defined(__AVX2__)

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

inline void store_interleaved(uint32_t* p, Quads a, Quads b) {
  const __m256i va = reinterpret_cast<__m256i>(a), vb = reinterpret_cast<__m256i>(b);
  const __m256i low = _mm256_unpacklo_epi64(va, vb), high = _mm256_unpackhi_epi64(va, vb);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), _mm256_permute2x128_si256(low, high, 0x31));
}

#else

inline Floats fused_multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

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

inline void store_interleaved(uint32_t* p, Quads a, Quads b) {
  for (int i = 0; i < kLanes / 2; ++i) {
    const uint64_t first = a[i], second = b[i];
    __builtin_memcpy(p + 4 * i, &first, sizeof first);
    __builtin_memcpy(p + 4 * i + 2, &second, sizeof second);
  }
}

#endif
