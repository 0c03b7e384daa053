// The final norm and its modulation of one row, for every op that ends in the vocabulary head.
#pragma once

#include "cpu/vector/math.inl"
#include "cpu/vector/tile.inl"

// Row `row` of p.hidden, normalised and modulated: D values and zeros up to a whole pair of vectors. Where
// bf16 operands are stored as floats they have the values of bf16: logits have the same bits in every op.
template <class Problem>
RowMoments modulate_row(const Problem& p, int64_t row, float* out) {
  const int64_t padded = round_up(p.width, 2 * kLanes), group = row / p.rows_per_group;
  const float* x = p.hidden + row * p.width;
  const float* shift = p.shift + group * p.width;
  const float* gain = p.gain + group * p.width;
  for (int64_t i = 0; i < padded; i += kLanes) store(out + i, load_some(x + i, p.width - i));
  const RowMoments m = p.normalized ? row_moments(out, p.width, padded) : RowMoments{0.0f, 1.0f};
  const bool round = p.bf16 && Bf16::kPerWord == 1;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const int64_t left = p.width - i;
    const Floats scaled = (load(out + i) - m.mean) * m.scale * load_some(p.norm + i, left);
    const Floats modulated = scaled * load_some(gain + i, left) + load_some(shift + i, left);
    store(out + i, round ? round_to_bf16(modulated) : modulated);
  }
  return m;
}
