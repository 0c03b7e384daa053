// Normalised rows and their logits, in terms of tile.inl.
#pragma once

#include "cpu/head/modulated_row.inl"

// Words of an operand row.
inline int64_t head_words(const HeadProblem& p) { return p.bf16 ? operand_words<Bf16>(p.width) : p.width; }

// Rows [begin, end) of the problem, normalised and modulated, as operands [end - begin, head_words].
// `row`: scratch of D floats and two vectors more.
void prepare_rows(const HeadProblem& p, int64_t begin, int64_t end, float* row, uint32_t* operands) {
  const int64_t words = head_words(p);
  for (int64_t r = begin; r < end; ++r, operands += words) {
    modulate_row(p, p.rows[r], row);
    p.bf16 ? store_row<Bf16>(row, p.width, operands) : store_row<Fp32>(row, p.width, operands);
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
