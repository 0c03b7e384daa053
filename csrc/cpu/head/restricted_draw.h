// Draws from the most probable tokens of a row: the same tokens, from the same numbers, as
// reference/nucleus.py, without sorting what cannot be drawn.
//
// Tokens are counted, and their probabilities summed, by the leading bits of their log-probability. That says
// how far down the row its restriction reaches; only what lies above is sorted, by radix, and summed in
// order. The race then skips the logarithms of tokens that cannot win, as the unrestricted one does.
#pragma once

#include <cstdint>

#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

struct RestrictedDrawProblem {
  const float* log_probs;  // [R, V]
  const float* tempered;   // [R, V] log-probabilities at the temperature, of the top_k alone if both restrict
  const float* probs;      // [R, V] exp(tempered); null: no top_p
  const int64_t* sequence;  // [R]
  const int64_t* step;      // [R]
  const int64_t* position;  // [R]
  int64_t num_rows, vocab_size;
  int64_t most;  // top_k, or V
  uint64_t seed;
  double temperature;
  float top_p;
};

void draw_restricted(const RestrictedDrawProblem& problem, int64_t* token, Isa isa, int num_threads);

// out [R, count]: the largest of values [R, V], in descending order, NaN as the least.
void largest_values(const float* values, int64_t num_rows, int64_t vocab_size, int64_t count, float* out,
                    int num_threads);

}  // namespace loopmdm::cpu
