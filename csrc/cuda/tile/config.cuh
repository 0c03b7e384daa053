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
  // Blocks that execute it together. Of two each has half of the rows; right operands and keys they load for
  // both. Four stand in a square: two sides have half of the columns each, and left operands are for both.
  static constexpr int kBlocks = LOOPMDM_BLOCKS, kSides = kBlocks > 2 ? 2 : 1, kRowBlocks = kBlocks / kSides;
  static constexpr int kRows = kTileRows / kRowBlocks;
  // Rows of a tile that go through a norm together; 0: there are no such tiles. MLP_IN, and without MLP_SUM
  // QKV, then normalise what they read.
  static constexpr int kNormRows = LOOPMDM_NORM_ROWS;
  // Of a block.
  static constexpr int kQkvColumns = LOOPMDM_QKV_COLUMNS, kAttnOutColumns = LOOPMDM_ATTN_OUT_COLUMNS;
  static constexpr int kMlpInColumns = LOOPMDM_MLP_IN_COLUMNS, kMlpOutColumns = LOOPMDM_MLP_OUT_COLUMNS;
  // Rows whose parts of MLP_OUT are added together, and normalised for the layer that follows; 0: one tile
  // goes through all parts. Tiles that share MLP_OUT's inner dimension are as many as parts, or one.
  static constexpr int kSumRows = LOOPMDM_SUM_ROWS;
  static constexpr int kMlpOutTiles = kSumRows > 0 ? kMlpOutParts : 1, kMlpOutInner = kMlp / kMlpOutTiles;
  // Whether products find their rows normalised.
  static constexpr bool kNormalQkv = kNormRows > 0 || kSumRows > 0, kNormalMlpIn = kNormRows > 0;
  static constexpr int kStages = LOOPMDM_STAGES, kStageBytes = LOOPMDM_STAGE_BYTES;

  // Two groups of four warps compute. They share the rows of a tile; with 64 rows its columns and heads, or
  // one of them has all.
  static constexpr int kGroups = 2, kRowGroups = kRows / 64, kColumnGroups = kGroups / kRowGroups;
  static constexpr int kHeadsPerTile = LOOPMDM_HEADS_PER_TILE;
  static constexpr int kComputeThreads = 128 * kGroups;
  static constexpr int kRowWarps = kTileRows / 16;  // that share the rows of an instruction

  static constexpr int kStep = 64;                     // of the inner dimension, a stage
  static constexpr int kKeyBlock = LOOPMDM_KEY_BLOCK;  // keys of a stage

  // Squared norms of a row tile: of each tile one a warp, or of MLP_SUM one a block.
  static constexpr int kChanges =
      kSumRows > 0 ? kTileRows / kSumRows * kBlocks : kHidden / kMlpOutColumns * kColumnGroups * kRowWarps;

  static_assert(kHeads % kHeadsPerTile == 0 && (kHeadsPerTile == 1 || kHeadsPerTile == kColumnGroups),
                "a group computes one head");
  static_assert(kRows == 64 || kRows == 128, "rows of a block");
  static_assert(kNormRows % kBlocks == 0 && (kNormRows == 0 || kTileRows % kNormRows == 0), "rows of a norm");
  static_assert(kHidden % kStep == 0 && kMlp % (kMlpOutParts * kStep) == 0, "widths in whole stages");
  static_assert(kSumRows % kBlocks == 0 && (kSumRows == 0 || kTileRows % kSumRows == 0), "rows of a sum");
  static_assert(kStageBytes % 1024 == 0, "swizzle atoms");
};

struct Parameters {
  const float* input;
  float* output;
  float* stream_values;         // [2, B, L, D]; see `keep`
  uint16_t* qkv_values;         // [2, B, L, 3 D]
  uint16_t* mixed_values;       // [B, L, D]
  uint16_t* gelu_values;        // [B, L, F]
  uint16_t* rows_values;        // [B, L, D], normalised and modulated; null where no product finds them so
  float* partial_values;        // [parts, B, L, D]; null without MLP_SUM
  PartStatistics* statistics1;  // [B, L, kParts]
  PartStatistics* statistics2;
  float2* change;             // squared norms, [B, row tiles, kChanges]
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

__device__ inline int rank_in_tile() { return static_cast<int>(blockIdx.x) % Config::kBlocks; }
// Which part of an instruction's rows the block has, and which of its columns.
__device__ inline int row_block() { return rank_in_tile() / Config::kSides; }
__device__ inline int side() { return rank_in_tile() % Config::kSides; }
// Its first row in the sequence, and the number of its columns among those of all tiles.
__device__ inline int first_row(const Instruction& item) {
  return item.row * Config::kTileRows + row_block() * Config::kRows;
}
__device__ inline int column_of(const Instruction& item) { return item.column * Config::kSides + side(); }

}  // namespace loopmdm
