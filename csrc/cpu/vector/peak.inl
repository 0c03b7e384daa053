// The chains of peak.h, in terms of vec.h.
#pragma once

#include "cpu/vector/tile.inl"

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

#if defined(__AMX_BF16__)

// Sums in registers 0-4: enough to hide the latency of a product.
float bf16_chains(int64_t rounds, float start) {
  constexpr int64_t kWords = kTmmRows * kTmmWords, kRowBytes = 4 * kTmmWords;
  alignas(64) uint32_t one[kWords], minus_one[kWords];
  alignas(64) float sums[5][kWords];
  for (int64_t i = 0; i < kWords; ++i) {
    one[i] = 0x3f803f80;
    minus_one[i] = 0xbf80bf80;
    for (int chain = 0; chain < 5; ++chain) sums[chain][i] = start + static_cast<float>(chain);
  }
  const TileScope scope;
  configure_tmm(kTmmRows, kTmmRows, kTmmWords);
  _tile_loadd(0, sums[0], kRowBytes);
  _tile_loadd(1, sums[1], kRowBytes);
  _tile_loadd(2, sums[2], kRowBytes);
  _tile_loadd(3, sums[3], kRowBytes);
  _tile_loadd(4, sums[4], kRowBytes);
  _tile_loadd(5, one, kRowBytes);
  _tile_loadd(6, one, kRowBytes);
  _tile_loadd(7, minus_one, kRowBytes);
  for (int64_t round = 0; round < rounds; ++round) {  // each round adds 32 and subtracts it again
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 6);
    _tile_dpbf16ps(4, 5, 6);
    _tile_dpbf16ps(0, 5, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_dpbf16ps(2, 5, 7);
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(4, 5, 7);
  }
  _tile_stored(0, sums[0], kRowBytes);
  _tile_stored(1, sums[1], kRowBytes);
  _tile_stored(2, sums[2], kRowBytes);
  _tile_stored(3, sums[3], kRowBytes);
  _tile_stored(4, sums[4], kRowBytes);
  float total = 0;
  for (int chain = 0; chain < 5; ++chain) total += sums[chain][0];
  return total;
}

constexpr double kBf16FlopsPerRound = 10.0 * kTmmRows * kTmmRows * 4 * kTmmWords;

#elif defined(__AVX512BF16__)

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

#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

float bf16_chains(int64_t rounds, float start) {
  // The number after 1: GCC 12 makes 1 itself with an instruction of half precision, which may not be there.
  const bfloat16x8_t one = vreinterpretq_bf16_u16(vdupq_n_u16(0x3f81));
  const bfloat16x8_t minus_one = vreinterpretq_bf16_u16(vdupq_n_u16(0xbf81));
  Floats chain[kChains];
  start_chains(chain, start);
  const auto add = [&](const bfloat16x8_t& value) {
#  pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i)
      chain[i] = reinterpret_cast<Floats>(vbfdotq_f32(reinterpret_cast<float32x4_t>(chain[i]), one, value));
  };
  for (int64_t round = 0; round < rounds; ++round) {  // each round adds what it subtracts again
    add(one);
    add(minus_one);
  }
  return sum_of_chains(chain);
}

constexpr double kBf16FlopsPerRound = 2 * kFp32FlopsPerRound;

#else

float bf16_chains(int64_t rounds, float start) { return fp32_chains(rounds, start); }

constexpr double kBf16FlopsPerRound = kFp32FlopsPerRound;

#endif

constexpr PeakKernel table = {fp32_chains, bf16_chains, kFp32FlopsPerRound, kBf16FlopsPerRound};
