// sample_rows on the CPU: projects selected rows onto the vocabulary, tile by tile, and keeps of each row
// only the winner of its race and its statistics. Weights pass through the cache once for many rows.
//
// A row's arithmetic does not depend on the rest of the call: a logit is one sum over D in order (tile.inl),
// tiles are visited in order and chunks merged in order, whichever thread worked on them and whichever rows
// came along.
#pragma once

#include <cstdint>

#include "common/row_math.h"
#include "cpu/head/head.h"
#include "cpu/head/restricted_draw.h"
#include "cpu/head/token_race.h"
#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

struct SampleRowsProblem {
  HeadProblem head;
  const int64_t* sequence;  // [R]
  const int64_t* step;      // [R]
  const int64_t* position;  // [R]
  int64_t excluded_token;   // -1: none
  uint64_t seed;
  float temperature;  // 0: greedy
};

struct SampleRowsOutput {
  int64_t* token;
  float* log_prob;
  int64_t* top1_token;
  float* top1_prob;
  float* top2_prob;
  float* entropy;
};

// The functions of one instruction set.
struct SampleRowsKernel {
  int64_t (*logits_scratch)(const HeadProblem&, int64_t rows);  // in floats
  void (*prepare)(const HeadProblem&, int64_t begin, int64_t end, float* row, uint32_t* operands);
  // Statistics of rows [begin, end), one batch, over one chunk of the vocabulary. `logits`: scratch for these
  // rows. `floors`: of each row, a score it is known to reach.
  void (*scan)(const SampleRowsProblem&, int64_t begin, int64_t end, const uint32_t* operands, int64_t chunk,
               float* logits, float* floors, RowStatistics* out);
  // Winner of a row's race in double precision, -1 if there is none. `kept`: [V, up to whole tiles], -inf for
  // tokens that may not be drawn.
  int64_t (*race_among)(const RestrictedDrawProblem&, int64_t row, const float* kept);

  // Of token_race.h. A panel of the head, and a row of operands, as bytes.
  void (*quantize_panel)(const LinearSource& head, bool bf16, int64_t panel, const QuantizedHead& out);
  void (*quantize_row)(const HeadProblem&, const uint32_t* operands, uint32_t* bytes, RowBound& bound);
  // Of rows [begin, end) and one chunk the tokens that may win, at most all of them; their number. `sums`:
  // scratch of kTileTokens for each row. `floors`: raised to what a token of the row reaches.
  int64_t (*find_contenders)(const TokenRaceProblem&, int64_t begin, int64_t end, const uint32_t* bytes,
                             const RowBound* bounds, int64_t chunk, float* sums, float* floors,
                             Contender* out);
  // Lets tokens, in ascending order, race. `panel`: scratch, a vector of words for each of D + 1.
  void (*race_contenders)(const TokenRaceProblem&, int64_t row, const uint32_t* operands,
                          const int32_t* tokens, int64_t count, uint32_t* panel, RaceState& state);
};

LOOPMDM_KERNEL(SampleRowsKernel, sample_rows_kernel)

void sample_rows(const SampleRowsProblem& problem, const SampleRowsOutput& out, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
