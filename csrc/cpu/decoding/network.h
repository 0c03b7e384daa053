// One call of a masked diffusion model's network: embedding, the blocks before, in and after the loop, and a
// draw for the rows that are asked for. It calls the kernels that `looped_blocks` and `sample_rows` call, so
// that its bits are theirs; what it saves is all that stands between them in Python.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/head/sample_rows.h"
#include "cpu/looped_blocks/looped_blocks.h"

namespace loopmdm::cpu {

struct Network {
  const void* embedding;   // [V, D] float or bf16
  const void* positions;   // [max L, D] of the same type, or null
  const float *cos, *sin;  // [L, K/2] or null
  std::vector<BlockPointers> blocks;
  const float* modulation;               // [blocks, 1, 6, D]
  int64_t num_before, num_after;         // blocks before and after the loop
  HeadProblem head;                      // but for hidden and rows
  std::optional<TokenRaceProblem> race;  // but for rows: tokens are drawn alone, and of probabilities it is
                                         // only said whether they are finite: log_prob is 0 or NaN
  int64_t hidden, width, heads;
  int64_t excluded_token;  // -1: none
  bool embedding_is_bf16;
  bool bf16;  // multiply in bf16
};

struct NetworkCall {
  const int64_t* tokens;  // [B, L]
  int64_t batch, length;
  int64_t num_loops;                                 // at most
  int64_t min_loops;                                 // before an exit
  double exit_threshold;                             // below 0: none
  const int64_t *rows, *sequence, *step, *position;  // [R]: flat indices b*L + l, and names of random numbers
  int64_t num_rows;
  uint64_t seed;
  float temperature;
};

// loops_used: [B].
void run_network(const Network& network, const NetworkCall& call, int64_t* loops_used,
                 const SampleRowsOutput& drawn, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
