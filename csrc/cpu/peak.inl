// The chains of peak.h, in terms of vec.h.

// Enough chains to hide the latency of the multiply-add units (at most 4 units x 4 cycles, or 2 x 6), few
// enough to stay in registers: AVX2 and SSE have 16, the others 32.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int kChains = 12;
#else
constexpr int kChains = 24;
#endif
constexpr int kStepsPerRound = 2;

// Different first values: equal chains could be computed once.
inline void start_chains(Floats* chain, float start) {
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chain[i] = broadcast(start + static_cast<float>(i));
}

inline float sum_of_chains(const Floats* chain) {
  Floats sum = {};
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  return sum_lanes(sum);
}

float fp32_chains(int64_t rounds, float start) {
  const Floats half = broadcast(0.5f);  // x / 2 + 1 / 2 tends to 1
  Floats chain[kChains];
  start_chains(chain, start);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 2
    for (int step = 0; step < kStepsPerRound; ++step)
#pragma GCC unroll 32
      for (int i = 0; i < kChains; ++i) chain[i] = fused_multiply_add(chain[i], half, half);
  return sum_of_chains(chain);
}

constexpr double kFp32FlopsPerRound = 2.0 * kLanes * kChains * kStepsPerRound;

#if defined(__AVX512BF16__)

float bf16_chains(int64_t rounds, float start) {
  const __m512bh one = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  const __m512bh minus_one = reinterpret_cast<__m512bh>(_mm512_set1_epi16(static_cast<short>(0xbf80)));
  Floats chain[kChains];
  start_chains(chain, start);
  for (int64_t round = 0; round < rounds; ++round) {  // each round adds 2 and subtracts it again
#  pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], one, one);
#  pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], one, minus_one);
  }
  return sum_of_chains(chain);
}

constexpr double kBf16FlopsPerRound = 2 * kFp32FlopsPerRound;

#else

float bf16_chains(int64_t rounds, float start) { return fp32_chains(rounds, start); }

constexpr double kBf16FlopsPerRound = kFp32FlopsPerRound;

#endif
