// Exponentials of logits, which the forward pass keeps and the backward pass reads or computes again. Values
// of type Kept: float, or uint16_t for bf16.
#pragma once

#include "cpu/head/masked_cross_entropy_tiles.inl"

// exp(d) for d <= 0; 0 where the result would be denormal; NaN stays NaN.
inline Floats exp_nonpositive(Floats d) {
  const Floats x = d * kLog2E, lowest = broadcast(-126.0f);
#if defined(__AVX512F__)  // the same steps in half the instructions
  const Floats f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, exp2_fraction(f, false), x - f);
#endif
  const Floats y = exp2_in_range(x < lowest ? lowest : x, false);
  return x < lowest ? Floats{} : (x == x ? y : x);
}

inline void store_kept(float* p, Floats v) { store(p, v); }

// Of bf16 and none of them denormal: an instruction takes those for zeros.
inline void store_kept(uint16_t* p, Floats v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &h, sizeof h);
#else
  store_bf16(p, v);
#endif
}

// Where those of a tile and a panel of rows are kept, [count][width], or null. The tokens of the tile have
// token_bytes each, which the panels fill from the first row on.
template <class Kept>
Kept* kept_panel(const KeptTiles& kept, int64_t token, int64_t count, int64_t row, int width) {
  constexpr int64_t kBytes = sizeof(Kept);
  const bool fits = (row + width) * kBytes <= kept.token_bytes && kept.token_bytes % kBytes == 0;
  if (kept.exponentials == nullptr || !fits) return nullptr;
  return reinterpret_cast<Kept*>(kept.exponentials + token * kept.token_bytes) + row * count;
}

// The maxima that the exponentials of a tile are relative to, of a panel of rows.
inline float* tile_largest(const MaskedCrossEntropyProblem& p, const RowGroup& g, const KeptTiles& kept,
                           int64_t tile, int64_t row) {
  return kept.largest + tile * p.num_rows + g.first + row;
}
