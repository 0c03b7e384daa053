// A stack of transformer blocks applied S times on the CPU.
//
// A block application on some rows of a sequence has two halves, cut where rows need each other:
// project (norm, modulate, q k v, rotary) and finish (attention, output projection, MLP). The second half of
// one block and the first half of the next run on the same rows while they are in the cache, so threads that
// share a sequence meet once a block. Keys and values are double-buffered: fast threads write the next
// block's while slow ones still read this one's.
#pragma once

#include <cstdint>

#include "cpu/linear/linear.h"
#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

struct BlockPointers {
  const uint32_t* qkv;       // packed, units of one head; q, k, v one after the other
  const uint32_t* attn_out;  // packed
  const uint32_t* mlp_in;
  const uint32_t* mlp_out;
  const float* norm1;         // [D]
  const float* norm2;         // [D]
  const float* mlp_in_bias;   // [F]
  const float* mlp_out_bias;  // [D]
};

struct LoopedBlocksProblem {
  const float* x;               // [B, L, D]
  const BlockPointers* blocks;  // [n], and before and behind them those outside the loop
  const float* modulation;      // of all of them, [n, M, 6, D], M = 1 or B
  const float* cos;             // [L, K/2] or null
  const float* sin;
  const bool* key_mask;      // [B, L] or null
  const int64_t* num_loops;  // [B], at least 0
  int64_t batch, length, hidden, width, heads, num_blocks, modulation_rows;
  int64_t first_loop;     // number of the first loop, names its dropout masks
  double exit_threshold;  // below 0: none
  double dropout;
  uint64_t dropout_seed;
  bool bf16;  // multiply in bf16
  // Blocks that are applied once, before and after the loop; without dropout and records only.
  int64_t num_before = 0, num_after = 0;
  int64_t free_loops = 0;  // the first ones, which no exit ends

  int64_t stored_blocks() const { return num_before + num_blocks + num_after; }
};

struct LoopedBlocksOutput {
  float* x;             // [B, L, D], may be the problem's
  int64_t* loops_used;  // [B]
  float* loop_inputs;   // [largest num_loops, B, L, D] or null: H(k) before each loop
  char* records;        // [largest num_loops * n, B] records of record_bytes(), or null
};

// What backward needs of one application of a block to one sequence, in operand words; branches are before
// dropout and gate. [L, hidden words], but for what is read a head or a panel of columns at a time and lies
// together as it is read: query, key and value [H, L, head words], mlp_in [panels, L, words of a panel]. Null
// pointers: nothing is recorded.
struct BlockRecord {
  uint32_t *normed1, *query, *key, *value, *mixed, *branch1, *normed2, *mlp_in, *branch2;
  float *scale1, *scale2;  // [L] reciprocal standard deviations
  float* log_sum_exp;      // [H, L]
};

// Rows that a thread carries through a block together, and needs memory for.
constexpr int kBlockRows = 96;

// Sizes that follow from the problem and the instruction set. Padded lengths are zero-filled.
struct BlockShape {
  int64_t length, hidden, width, heads, head_dim;
  int64_t hidden_padded, width_padded;  // whole pairs of vectors
  int64_t head_width;                   // whole vectors
  int64_t keys;                         // whole pairs of vectors
  int64_t per_word;                     // operands in a word
  int64_t hidden_words() const { return hidden_padded / per_word; }
  int64_t width_words() const { return width_padded / per_word; }
  int64_t head_words() const { return head_dim / per_word; }
  int64_t record_bytes() const;  // of one application to one sequence
  BlockRecord record_at(char* memory) const;
  // Where the rows of one head begin in what is recorded by heads.
  int64_t head_record(int64_t head) const { return head * length * head_words(); }
  // The same of a panel of columns that begins at `column`.
  int64_t panel_record(int64_t column) const { return column / per_word * length; }
  // How many fill a block of rows, at least 1.
  int64_t sequences_together() const { return length < kBlockRows ? kBlockRows / length : 1; }
  int64_t key_size() const { return heads * keys * head_words(); }
  int64_t value_size() const { return heads * head_width * keys / per_word; }
};

// Vectors of one block for one modulation row, padded; gains hold norm * (1 + scale).
struct BlockVectors {
  const float *shift1, *gain1, *gate1, *shift2, *gain2, *gate2, *mlp_in_bias, *mlp_out_bias;
};

struct Dropout {
  uint32_t threshold;  // a 32-bit word below it drops the element; 0: no dropout
  float keep_scale;    // 1 / (1 - rate)
  uint64_t seed;
  uint32_t application;  // loop * n + block
};

struct SequenceState {
  float* x;           // [L, padded D], the residual stream
  uint32_t* queries;  // [L, hidden words]
  uint32_t* keys[2];  // panels of every head, or null: rows
  uint32_t* values[2];
  uint32_t *key_rows, *value_rows;  // [L, hidden words]
  const float* key_bias;  // [padded L] 0 or very negative; null: every key counts and L is whole panels
  const float *cos, *sin;
  int64_t first_element;  // of this sequence in [B, L, D], names the random numbers
};

// Rows [first, first + count) of a sequence in one application of a block; first is even.
struct RowSpan {
  const SequenceState* state;
  BlockVectors vectors;
  BlockRecord record;
  Dropout dropout;
  int64_t first, count;
};

// Spans whose rows go through each product together: at most `kBlockRows` of them.
struct RowSpans {
  const RowSpan* at;
  int64_t size, rows;
};

struct LoopedBlocksKernel {
  int64_t (*scratch_bytes)(const BlockShape&);
  void (*clear_scratch)(const BlockShape&, void* scratch);
  void (*project)(const BlockShape&, bool bf16, const BlockPointers&, const RowSpans&, int parity,
                  void* scratch);
  void (*finish)(const BlockShape&, bool bf16, const BlockPointers&, const RowSpans&, int parity,
                 void* scratch);
  // Sums of squares over a row: of x - old, and of x.
  void (*row_change)(const float* x, const float* old, int64_t hidden_padded, float* change, float* size);
};

LOOPMDM_KERNEL(LoopedBlocksKernel, looped_blocks_kernel)

BlockShape block_shape(const LoopedBlocksProblem& problem, Isa isa);

void looped_blocks(const LoopedBlocksProblem& problem, const LoopedBlocksOutput& out, Isa isa,
                   int num_threads);

}  // namespace loopmdm::cpu
