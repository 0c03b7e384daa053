// The vocabulary head on selected rows: what the ops that end in logits share.
#pragma once

#include <cstdint>

namespace loopmdm::cpu {

constexpr int kTileTokens = 256;               // logits of a tile stay in cache until they are used
constexpr int kChunkTokens = 4 * kTileTokens;  // of a task
constexpr int kBatchRows = 132;                // at most; rows of a task, which share its weights in cache
constexpr int kRowStep = 6;                    // of a batch: whole register tiles of tile.inl
constexpr int kRowPadding = 64;                // floats behind a row, for whole vectors

struct HeadProblem {
  const float* hidden;     // [B*L, D]
  const int64_t* rows;     // [R] indices into hidden
  const float* norm;       // [D]
  const float* shift;      // [M, D]
  const float* gain;       // [M, D], 1 + scale
  const uint32_t* weight;  // [V, D] in panels, see linear.h
  const float* bias;       // [V]
  int64_t num_rows;        // R
  int64_t rows_per_group;  // rows of hidden that share a row of shift and gain: L, or B*L if M = 1
  int64_t width;           // D
  int64_t vocab_size;      // V
  bool bf16;               // operands are bf16
  bool normalized;         // rows go through the layer norm; else they are taken as they are, and norm is 1
};

// Rows and tokens cut into tasks. Consecutive tasks share a chunk of the weights.
struct HeadTasks {
  int64_t num_rows, batch_rows, num_batches, num_chunks;

  HeadTasks(int64_t rows, int64_t vocab_size)
      : num_rows(rows), num_chunks((vocab_size + kChunkTokens - 1) / kChunkTokens) {
    const int64_t needed = (rows + kBatchRows - 1) / kBatchRows;
    const int64_t even = (rows + needed - 1) / needed;
    batch_rows = (even + kRowStep - 1) / kRowStep * kRowStep;
    num_batches = (rows + batch_rows - 1) / batch_rows;
  }

  int64_t count() const { return num_batches * num_chunks; }
  int64_t chunk(int64_t task) const { return task / num_batches; }
  int64_t batch(int64_t task) const { return task % num_batches; }
  int64_t first_row(int64_t batch) const { return batch * batch_rows; }
  int64_t end_row(int64_t batch) const {
    const int64_t end = (batch + 1) * batch_rows;
    return end < num_rows ? end : num_rows;
  }
};

}  // namespace loopmdm::cpu
