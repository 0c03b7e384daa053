// sample_rows on the CPU: projects selected rows onto the vocabulary, tile by tile, and keeps of each row
// only the winner of its race and its statistics. Weights pass through the cache once for many rows.
#pragma once

#include <cstdint>

#include "common/row_math.h"
#include "cpu/isa.h"

namespace loopmdm::cpu {

// A row's arithmetic depends on these numbers and on nothing else in the call: tiles are visited in order,
// chunks are merged in order, whichever thread worked on them and whichever rows came along.
constexpr int kTileTokens = 96;
constexpr int kTilesPerChunk = 32;
constexpr int kChunkTokens = kTileTokens * kTilesPerChunk;
constexpr int kBatchRows = 128;       // rows that share one passage of the weights
constexpr int kActivationAlign = 32;  // activation rows are padded with zeros to a multiple of this

struct SampleRowsProblem {
  const float* hidden;      // [B*L, D]
  const int64_t* rows;      // [R] indices into hidden
  const float* norm;        // [D]
  const float* shift;       // [M, D]
  const float* gain;        // [M, D], 1 + scale
  const void* weight;       // [V, D] float or bf16
  const float* bias;        // [V]
  const int64_t* sequence;  // [R]
  const int64_t* step;      // [R]
  const int64_t* position;  // [R]
  int64_t num_rows;         // R
  int64_t rows_per_group;   // rows of hidden that share a row of shift and gain: L, or B*L if M = 1
  int64_t width;            // D
  int64_t vocab_size;       // V
  int64_t excluded_token;   // -1: none
  uint64_t seed;
  float temperature;  // 0: greedy
  bool weight_is_bf16;
  bool compute_in_bf16;
};

struct SampleRowsOutput {
  int64_t* token;
  float* log_prob;
  int64_t* top1_token;
  float* top1_prob;
  float* top2_prob;
  float* entropy;
};

struct SampleRowsScratch {
  void* weight_tile;  // [kTileTokens, padded D]
  float* logits;      // [kBatchRows, kTileTokens]
};

// The functions of one instruction set.
struct SampleRowsKernel {
  // Normalises and modulates rows [begin, end) of the problem into activations [end - begin, padded D].
  void (*prepare)(const SampleRowsProblem&, int64_t begin, int64_t end, void* activations);
  // Statistics of rows [begin, end), at most kBatchRows, over one chunk of the vocabulary.
  void (*scan)(const SampleRowsProblem&, int64_t begin, int64_t end, const void* activations, int64_t chunk,
               const SampleRowsScratch&, RowStatistics* out);
};

void sample_rows(const SampleRowsProblem& problem, const SampleRowsOutput& out, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
