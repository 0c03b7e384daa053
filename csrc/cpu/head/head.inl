// Normalised rows and their logits, in terms of tile.inl.
#pragma once

#include "cpu/vector/math.inl"
#include "cpu/vector/tile.inl"

// Words of an operand row.
inline int64_t head_words(const HeadProblem& p) { return p.bf16 ? operand_words<Bf16>(p.width) : p.width; }

// Rows [begin, end) of the problem, normalised and modulated, as operands [end - begin, head_words].
// `row`: scratch of D floats and two vectors more.
void prepare_rows(const HeadProblem& p, int64_t begin, int64_t end, float* row, uint32_t* operands) {
  const int64_t words = head_words(p), width = p.width;
  const int64_t padded = round_up(width, 2 * kLanes);
  for (int64_t r = begin; r < end; ++r, operands += words) {
    const float* x = p.hidden + p.rows[r] * width;
    const int64_t group = p.rows[r] / p.rows_per_group;
    const float* shift = p.shift + group * width;
    const float* gain = p.gain + group * width;
    __builtin_memcpy(row, x, static_cast<size_t>(width) * sizeof *x);
    for (int64_t i = width; i < padded; ++i) row[i] = 0.0f;
    const RowMoments m = p.normalized ? row_moments(row, width, padded) : RowMoments{0.0f, 1.0f};
    for (int64_t i = 0; i < width; ++i) row[i] = (row[i] - m.mean) * m.scale * p.norm[i] * gain[i] + shift[i];
    if (!p.bf16) {
      store_row<Fp32>(row, width, operands);
    } else {
      if constexpr (Bf16::kPerWord == 1)  // stored as floats, but with the values of bf16
        for (int64_t i = 0; i < padded; i += kLanes) store(row + i, round_to_bf16(load(row + i)));
      store_row<Bf16>(row, width, operands);
    }
  }
}

// Sums of `rows` operand rows with the `count` tokens from first_token on, a multiple of kPanel: logits
// without bias [rows, kTileTokens]. Up to the next 2 * kLanes columns are written. `wide`: scratch for a
// panel.
template <class Operand>
void multiply_tokens(const HeadProblem& p, const uint32_t* operands, int64_t rows, int64_t first_token,
                     int64_t count, float* logits, float* wide) {
  using Weights = typename Operand::Weights;
  const int64_t words = head_words(p), columns = round_up(count, 2 * kLanes);
  for (int64_t column = 0; column < columns; column += kPanel)
    multiply_packed<Operand>(
        {operands, words, 1}, rows, p.weight + (first_token + column) * right_words<Weights>(words),
        panel_width(columns, column), words, logits + column, kTileTokens, false, true, wide);
}

inline void multiply_tile(const HeadProblem& p, const uint32_t* operands, int64_t rows, int64_t first_token,
                          int64_t count, float* logits, float* wide) {
  p.bf16 ? multiply_tokens<Bf16>(p, operands, rows, first_token, count, logits, wide)
         : multiply_tokens<Fp32>(p, operands, rows, first_token, count, logits, wide);
}

// Floats of scratch that the logits of `rows` rows take: [rows, kTileTokens] for them, and a panel of
// weights.
int64_t logits_scratch(const HeadProblem& p, int64_t rows) {
  return rows * kTileTokens + (p.bf16 ? wide_panel_size<Bf16>(p.width) : 0);
}
