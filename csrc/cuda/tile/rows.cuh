// Rows of a tile by threads: which a thread holds, their norm, and the stream as left operand of a product.
#pragma once

#include "common/fragment.h"
#include "common/swizzle.h"
#include "cuda/tile/config.cuh"
#include "cuda/tile/row_math.cuh"

namespace loopmdm {

// Where a thread stands: its group's share of the tile, and its two rows of each sum's four.
struct Seat {
  int thread;  // of the group
  int row_group, column_group;
  int row;  // the upper one of the instruction's; the lower is 8 further down

  __device__ Seat() {
    // Hidden from the compiler, which would keep what follows from it for all phases in registers, for good.
    int number = threadIdx.x;
    asm volatile("" : "+r"(number));
    thread = number % 128;
    row_group = number / 128 % Config::kRowGroups;
    column_group = number / 128 / Config::kRowGroups;
    row = row_block() * Config::kRows + 64 * row_group + fragment_row(thread, 0);
  }

  __device__ int column(int index) const { return fragment_column(thread, index); }
};

__device__ inline float2 row_norm(const PartStatistics* statistics, int lane) {
  return merged_norm(lane, [&](int part) { return load_pair(&statistics[part].mean); });
}

// The norms of the thread's two rows; of rows beyond the sequence all is 0.
struct RowScales {
  float scale[2] = {0, 0}, offset[2] = {0, 0};

  __device__ static RowScales load(const Parameters& p, const Instruction& item,
                                   const PartStatistics* statistics, const Seat& seat) {
    RowScales result;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = item.row * Config::kTileRows + seat.row + 8 * half;
      const int64_t token = p.token(item.sequence, row < p.length ? row : 0);
      const float2 norm = row_norm(statistics + token * Config::kParts, seat.thread);
      if (row >= p.length) continue;
      result.scale[half] = norm.x;
      result.offset[half] = norm.y;
    }
    return result;
  }
};

// Where a thread finds its pairs of the stream in a stage, and their gains and shifts. In a panel of 32
// columns it reads first one half of 16 and then the other; see stream_step in common/fragment.h.
struct StreamReader {
  uint32_t pair[2][2];      // bytes: half of the panel, upper or lower eight columns of it
  const float4* affine[2];  // of two columns: gain, gain, shift, shift
  bool odd_row;

  __device__ StreamReader(const Seat& seat, const float4* vectors)
      : odd_row(stream_step(seat.thread, 0) != 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = 16 * stream_step(seat.thread, half);
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int column = first + operand_column(seat.thread, 2 * upper);
        pair[half][upper] = panel_offset(seat.row % Config::kRows, column, Config::kRows, 4);
      }
      affine[half] = vectors + (first + operand_column(seat.thread, 0)) / 2;
    }
  }

  // Gains and shifts of a stage, by panel, half and upper columns. They are constants: who loads them before
  // a stage is waited for does not wait for them behind it.
  using Vectors = float4[2][2][2];

  __device__ void load_vectors(Vectors& vectors, int column) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      vectors[i / 4][i / 2 % 2][i % 2] = __ldg(affine[i / 2 % 2] + (column + 32 * (i / 4) + 8 * (i % 2)) / 2);
    }
  }

  // 16 columns of panel `panel` as left operand: normalised, modulated, rounded. Eight rows further down a
  // row has the same swizzle.
  __device__ void read(uint32_t (&operand)[4], uint32_t stage, int panel, int half, const Vectors& all,
                       const RowScales& rows) const {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const float4 vectors = all[panel][half][upper];
#pragma unroll
      for (int lower_row = 0; lower_row < 2; ++lower_row) {
        const float2 x = load_shared_pair(stage + pair[half][upper] + panel * 128 * Config::kRows +
                                          lower_row * kSwizzleAtomBytes);
        operand[2 * upper + lower_row] = modulated(x, rows.scale[lower_row], rows.offset[lower_row], vectors);
      }
    }
  }

  // The four left operands of a stage.
  __device__ void read_stage(uint32_t (&operands)[4][4], uint32_t stage, const Vectors& vectors,
                             const RowScales& rows) const {
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      uint32_t first[4], second[4];
      read(first, stage, panel, 0, vectors, rows);
      read(second, stage, panel, 1, vectors, rows);
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        operands[2 * panel][reg] = odd_row ? second[reg] : first[reg];
        operands[2 * panel + 1][reg] = odd_row ? first[reg] : second[reg];
      }
    }
  }
};

}  // namespace loopmdm
