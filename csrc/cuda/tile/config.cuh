// What the kernels that work by tiles know when they are compiled, as macros of the command line, and what
// they get at launch; the architecture's own header adds its part. loopmdm_kernels/cuda/parameters.py writes
// the macros and reads the structs.
#pragma once

#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/warps.cuh"
#include "cuda/tile/widths.cuh"

namespace loopmdm {

struct Config : Widths {
  static constexpr int kTileRows = LOOPMDM_ROWS;  // of an instruction
  // Blocks that execute it together. Each has half of the rows; right operands and keys they load for both.
  static constexpr int kPair = LOOPMDM_PAIR, kRows = kTileRows / kPair;
  // Rows of a tile that go through a norm together; 0: there are no such tiles, products normalise what they
  // read.
  static constexpr int kNormRows = LOOPMDM_NORM_ROWS;
  static constexpr int kQkvColumns = LOOPMDM_QKV_COLUMNS, kAttnOutColumns = LOOPMDM_ATTN_OUT_COLUMNS;
  static constexpr int kMlpInColumns = LOOPMDM_MLP_IN_COLUMNS, kMlpOutColumns = LOOPMDM_MLP_OUT_COLUMNS;
  // Tiles that share MLP_OUT's inner dimension: as many as it has parts, or one that goes through them all.
  static constexpr int kMlpOutTiles = LOOPMDM_MLP_OUT_TILES, kMlpOutInner = kMlp / kMlpOutTiles;
  static constexpr int kStages = LOOPMDM_STAGES, kStageBytes = LOOPMDM_STAGE_BYTES;

  // Two groups of four warps compute. They share the rows of a tile; with 64 rows, its columns or heads.
  static constexpr int kGroups = 2, kRowGroups = kRows / 64, kColumnGroups = kGroups / kRowGroups;
  static constexpr int kHeadsPerTile = kColumnGroups;
  static constexpr int kComputeThreads = 128 * kGroups;
  static constexpr int kRowWarps = kTileRows / 16;  // that share the rows of an instruction

  static constexpr int kStep = 64;                     // of the inner dimension, a stage
  static constexpr int kKeyBlock = LOOPMDM_KEY_BLOCK;  // keys of a stage

  static constexpr int kChanges = kHidden / (kMlpOutColumns / kColumnGroups);  // squared norms of a row tile

  static_assert(kMlpOutTiles == 1 || kMlpOutTiles == kMlpOutParts, "a part each, or all of them");
  static_assert(kHeads % kHeadsPerTile == 0, "a group computes one head");
  static_assert(kRows == 64 || kRows == 128, "rows of a block");
  static_assert(kNormRows % kPair == 0 && (kNormRows == 0 || kTileRows % kNormRows == 0), "rows of a norm");
  static_assert(kHidden % kStep == 0 && kMlp % (kMlpOutParts * kStep) == 0, "widths in whole stages");
  static_assert(kQkvColumns / kColumnGroups % kHeadDim == 0, "a group rotates whole heads");
  static_assert(2 * kHidden % (kQkvColumns / kColumnGroups) == 0, "and either all of them or none");
  static_assert(kStageBytes % 1024 == 0, "swizzle atoms");
};

struct Parameters {
  const float* input;
  float* output;
  float* stream_values;         // [2, B, L, D]; see `keep`
  uint16_t* qkv_values;         // [2, B, L, 3 D]
  uint16_t* mixed_values;       // [B, L, D]
  uint16_t* gelu_values;        // [B, L, F]
  uint16_t* rows_values;        // [B, L, D], normalised and modulated; null without norms of their own
  float4* partial_values;       // see parts.cuh
  PartStatistics* statistics1;  // [B, L, kParts]
  PartStatistics* statistics2;
  float2* change;             // squared norms, [B, row tiles, kChanges, kRowWarps]
  const float4* affine;       // [n, modulated sequences, 2, D / 2]: gain, gain, shift, shift of two columns
  const float* gate;          // [n, modulated sequences, 2, D]
  const float* mlp_in_bias;   // [n, F]
  const float* mlp_out_bias;  // [n, D]
  const float* cosines;       // [L, K / 2] or null
  const float* sines;
  const uint8_t* key_mask;  // [B, L] or null
  const Instruction* table;
  int32_t* counters;         // of the table, then progress [B], then the two below
  int32_t* stop;             // [B] loops of each sequence
  const int32_t* max_loops;  // one number, the largest of `stop`
  TableSize size;
  int32_t batch, length, row_tiles, num_counters, modulated_sequences, adaptive;
  int32_t keep;  // the stream has S + 1 matrices, and keeps the inputs of all loops
  float exit_threshold;

  __device__ int32_t* progress(int sequence) const { return counters + num_counters + sequence; }
  // How many sequences have their last loop settled, and the largest number of loops among these.
  __device__ int32_t* settled() const { return counters + num_counters + batch; }
  __device__ int32_t* longest() const { return settled() + 1; }
  __device__ int64_t token(int sequence, int row) const {
    return static_cast<int64_t>(sequence) * length + row;
  }
};

// Which half of an instruction's rows the block has.
__device__ inline int rank_in_pair() { return static_cast<int>(blockIdx.x) % Config::kPair; }
// Its first row in the sequence.
__device__ inline int first_row(const Instruction& item) {
  return item.row * Config::kTileRows + rank_in_pair() * Config::kRows;
}

}  // namespace loopmdm
