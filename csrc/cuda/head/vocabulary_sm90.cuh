// Logits of rows [R, D] by the weight [V, D], tile by tile, in registers: what `sample_rows` and
// `masked_cross_entropy` have in common. Blocks are persistent; one warp loads, two warp groups multiply.
// With 128 rows a tile they share its tokens; with 64 rows each has a chunk of tokens of its own, and a block
// streams twice the weight. Either way a warp group makes 64 rows by one chunk, with the same bits. Blocks of
// 128 rows come in pairs, which share the chunk and load half of it each, for both: half the reads of L2.
#pragma once

#include "common/fragment.h"
#include "common/matrix_descriptor.h"
#include "common/vocabulary_tiles.h"
#include "cuda/tile/math.cuh"
#include "cuda/tile/stage_ring_sm90.cuh"

namespace loopmdm {

struct Vocabulary {
  static constexpr int kRows = LOOPMDM_ROWS;
  static constexpr int kRowGroups = kRows / 64, kChunks = 2 / kRowGroups;  // chunks of a tile
  static constexpr int kComputeThreads = 256, kThreads = kComputeThreads + 128;
  static constexpr int kStep = 64;  // of D, a stage
  static constexpr int kStages = kRows == 64 ? 3 : 4;
  static constexpr int kLeftBytes = 2 * kRows * kStep, kChunkBytes = 2 * kChunkTokens * kStep;
  static constexpr int kStageBytes = kLeftBytes + kChunks * kChunkBytes;
  static constexpr int kSums = kChunkTokens / 2;  // of a thread
  static constexpr bool kPaired = kRows == 128;
  static constexpr int kBlocks = kPaired ? 2 : 1;  // that have one tile together
  static_assert(kRows == 64 || kRows == 128, "rows of a tile");

  using Ring = StageRing<kStages, kStageBytes, kComputeThreads / 32, kBlocks>;
};

using Logits = float[Vocabulary::kSums];  // a thread's part of a tile

struct LogitsProblem {
  TensorMap rows, weight;  // [1, R, D], [1, V, D] bf16; boxes of 64 columns by kRows, kChunkTokens / kBlocks
  const float* bias;       // [V]
  int32_t tiles, num_rows, vocab_size, excluded_token, row_tiles, column_tiles, steps;
};

// The tile of a block, of those that it or its pair goes through.
__device__ inline VocabularyTile tile_of(const LogitsProblem& p, int32_t number) {
  VocabularyTile tile = vocabulary_tile(number, p.row_tiles, p.column_tiles);
  if (Vocabulary::kPaired) tile.row = 2 * tile.row + rank_in_cluster();
  return tile;
}

__device__ inline int32_t first_tile() { return blockIdx.x / Vocabulary::kBlocks; }
__device__ inline int32_t tile_stride() { return gridDim.x / Vocabulary::kBlocks; }

// A thread's place in a tile: its two rows of each four sums, and the first token of its warp group.
struct VocabularySeat {
  int thread;  // of the warp group
  int row;     // of all rows; the lower one is 8 further down
  int32_t chunk;
  int32_t first;  // token

  __device__ VocabularySeat(VocabularyTile tile) {
    const int group = warp_group();
    thread = threadIdx.x % 128;
    row = tile.row * Vocabulary::kRows + group % Vocabulary::kRowGroups * 64 + fragment_row(thread, 0);
    chunk = tile.column * Vocabulary::kChunks + group / Vocabulary::kRowGroups;
    first = chunk * kChunkTokens;
  }

  __device__ int row_of(int half) const { return row + 8 * half; }
  __device__ int column(int index) const { return fragment_column(thread, index); }
};

__device__ inline void load_logits(const LogitsProblem& p, const Vocabulary::Ring& ring) {
  const bool leader = threadIdx.x % 32 == 0;
  const uint64_t keep = keep_policy();
  RingPlace place{0, 0};
  for (int32_t number = first_tile(); number < p.tiles; number += tile_stride()) {
    const VocabularyTile tile = tile_of(p, number);
    for (int step = 0; step < p.steps; ++step) {
      ring.wait_empty(place);
      if (leader) {
        const uint32_t stage = ring.stage(place), full = ring.full(place);
        const int column = step * Vocabulary::kStep;
        barrier_arrive_expect(full, Vocabulary::kStageBytes);
        load_box(stage, &p.rows, full, column, tile.row * Vocabulary::kRows, 0, keep);
        if (Vocabulary::kPaired) {
          const int half = rank_in_cluster();
          load_box_for_all(stage + Vocabulary::kLeftBytes + half * Vocabulary::kChunkBytes / 2, &p.weight,
                           full, column, tile.column * kChunkTokens + half * kChunkTokens / 2, 0, 0b11);
        } else {
          for (int i = 0; i < Vocabulary::kChunks; ++i) {
            load_box(stage + Vocabulary::kLeftBytes + i * Vocabulary::kChunkBytes, &p.weight, full, column,
                     (tile.column * Vocabulary::kChunks + i) * kChunkTokens, 0);
          }
        }
      }
      __syncwarp();
      Vocabulary::Ring::next(place);
    }
  }
}

__device__ inline void multiply_logits(Logits& sums, const Vocabulary::Ring& ring, RingPlace& place,
                                       int steps) {
  const int group = warp_group();
  const uint32_t left_offset = group % Vocabulary::kRowGroups * 64 * 128;
  const uint32_t right_offset =
      Vocabulary::kLeftBytes + group / Vocabulary::kRowGroups * Vocabulary::kChunkBytes;
  const auto multiply = [&](RingPlace at, int step) {
    const uint32_t stage = ring.stage(at);
#pragma unroll
    for (int k = 0; k < Vocabulary::kStep / 16; ++k) {
      WarpGroupProduct<kChunkTokens>::shared(sums, inner_major_descriptor(stage + left_offset, k),
                                             inner_major_descriptor(stage + right_offset, k), step + k > 0);
    }
  };
  multiply_stages(sums, ring, place, steps, multiply, [](RingPlace) {});
}

// Sums become logits; those of tokens that cannot be are minus infinity, whatever the weight holds there.
__device__ inline void add_bias(Logits& sums, const LogitsProblem& p, const VocabularySeat& seat) {
  const auto add = [&](int group, float2 bias) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums[4 * group + 2 * half] += bias.x;
      sums[4 * group + 2 * half + 1] += bias.y;
    }
  };
  const float* const bias = p.bias + seat.first + seat.column(0);
  const int left = p.vocab_size - seat.first - seat.column(0);  // tokens from here on
  if (seat.first + kChunkTokens <= p.vocab_size) {
#pragma unroll
    for (int group = 0; group < kChunkTokens / 8; ++group) add(group, load_constant_pair(bias + 8 * group));
  } else {
#pragma unroll
    for (int group = 0; group < kChunkTokens / 8; ++group) {
      add(group, make_float2(8 * group < left ? __ldg(bias + 8 * group) : -LOOPMDM_INFINITY,
                             8 * group + 1 < left ? __ldg(bias + 8 * group + 1) : -LOOPMDM_INFINITY));
    }
    pin(sums);  // or the compiler moves all additions behind the branches, and 64 biases wait in registers
  }
  const int excluded = p.excluded_token - seat.first;
  if (excluded >= 0 && excluded < kChunkTokens) {
#pragma unroll
    for (int i = 0; i < Vocabulary::kSums; ++i) {
      if (seat.column(i) == excluded) sums[i] = -LOOPMDM_INFINITY;
    }
  }
}

// The whole kernel: `use(logits, seat)` is called by every computing thread for each of its tiles.
template <class Use>
__device__ void for_each_tile(const LogitsProblem& p, Use use) {
  const Vocabulary::Ring ring(dynamic_shared_memory());
  if (threadIdx.x == 0) ring.initialise();
  Vocabulary::Ring::meet_all();
  const auto compute = [&] {
    RingPlace place{0, 0};
    for (int32_t number = first_tile(); number < p.tiles; number += tile_stride()) {
      const VocabularySeat seat(tile_of(p, number));
      Logits logits;
      multiply_logits(logits, ring, place, p.steps);
      add_bias(logits, p, seat);
      use(logits, seat);
    }
  };
  load_and_compute<24>([&] { load_logits(p, ring); }, compute);
  if (Vocabulary::kPaired) Vocabulary::Ring::meet_all();
}

}  // namespace loopmdm
