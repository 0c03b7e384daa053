// Sums of one warp over the stages of a product: 16 rows by kColumns.
#pragma once

#include "cuda/ptx/mma.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/stages_sm80.cuh"

namespace loopmdm {

// A product's tile: where its operands come from and how they lie in a stage, the left one first.
// `kParts`: of the inner dimension, one of which the tile multiplies.
template <int kLeftBytes, int kInner, int kTileColumns, int kParts = 1>
struct Operands {
  static constexpr int kSteps = kInner / kParts / Config::kStep;
  static constexpr int kColumns = kTileColumns / Config::kColumnGroups;  // of a group of warps
  static constexpr uint32_t kLeft = kLeftBytes * Config::kRows * Config::kStep;
  static_assert(kLeft + 2 * kTileColumns * Config::kStep <= Config::kStageBytes, "a stage holds both");

  const uint8_t* left;      // the tile's first row
  const uint16_t* weights;  // the first of its kTileColumns rows
  int inside;               // how many of its rows there are
  uint64_t policy;

  __device__ void copy_left(int step, uint32_t stage) const {
    constexpr int kChunks = kLeftBytes * Config::kStep / 16;
    copy_rows<Config::kRows, kChunks>(stage, left + step * kChunks * 16, kLeftBytes * kInner, inside);
  }

  __device__ void copy_weights(int step, uint32_t stage) const {
    const uint16_t* const first = weights + step * Config::kStep;
    copy_pieces<kTileColumns, 8>(stage + kLeft, [&](uint32_t place, int row, int chunk) {
      copy_16(place, first + row * kInner + 8 * chunk, policy);
    });
  }

  // Those that need not wait for the tile's inputs: all that the stages have room for.
  __device__ void copy_first_weights(const Stages& stages) const {
#pragma unroll 1
    for (int step = 0; step < min(kSteps, Config::kStages - 1); ++step) {
      copy_weights(step, stages.address(step));
    }
    copies_commit();
  }

  // Every stage goes through here; `use(step, address)` does its products. The first weights are under way.
  template <class Use>
  __device__ void each_stage(Stages stages, const Use& use) const {
    stages.begin([this](int step, uint32_t stage) {
      if (step < kSteps) copy_left(step, stage);
    });
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      use(step, stages.next([this](int ahead, uint32_t stage) {
        if (ahead >= kSteps) return;
        copy_weights(ahead, stage);
        copy_left(ahead, stage);
      }));
    }
  }
};

// Offset of the 16 bytes whose address a lane gives to load a 16 x 16 operand, rows along a panel's rows: the
// left one of a product, in the order of its registers. The next 16 of the inner dimension: xor 32 * step,
// since a panel begins at a multiple of 128 bytes.
__device__ inline uint32_t row_operand_offset(int lane) {
  return lane % 16 * kSwizzleRowBytes + ((lane / 16 ^ lane % 8) << 4);
}

// The same for the right operand, 16 columns as rows of the panel: both halves of the inner dimension of the
// first eight columns, then those of the others.
__device__ inline uint32_t column_operand_offset(int lane) {
  return (lane / 16 * 8 + lane % 8) * kSwizzleRowBytes + ((lane / 8 % 2 ^ lane % 8) << 4);
}

// sums += left * the columns that begin at `panel`; `place` is their offset of the lane and step.
template <int kColumns>
__device__ void multiply_columns(float (&sums)[kColumns / 2], const uint32_t (&left)[4], uint32_t panel,
                                 uint32_t place) {
#pragma unroll
  for (int group = 0; group < kColumns / 16; ++group) {
    uint32_t right[4];
    load_matrices(right, panel + 16 * kSwizzleRowBytes * group + place);
    multiply_add(&sums[8 * group], left, right[0], right[1]);
    multiply_add(&sums[8 * group + 4], left, right[2], right[3]);
  }
}

// norm(x) * gain + shift, times weights: the left operand is made in registers.
template <class Operands>
__device__ void stream_product(float (&sums)[Operands::kColumns / 2], const Operands& operands,
                               const Stages& stages, const Seat& seat, const RowScales& rows,
                               const float4* affine) {
  const StreamReader reader(seat, affine);
  const uint32_t place = column_operand_offset(seat.thread % 32);
  operands.each_stage(stages, [&](int step, uint32_t stage) {
    uint32_t left[4][4];
    StreamReader::Vectors vectors;
    reader.load_vectors(vectors, step * Config::kStep);
    reader.read_stage(left, stage, vectors, rows);
    const uint32_t right = stage + Operands::kLeft + seat.column_group * Operands::kColumns * 128;
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_columns<Operands::kColumns>(sums, left[k], right, place ^ 32 * k);
  });
}

// Both operands from shared memory.
template <class Operands>
__device__ void shared_product(float (&sums)[Operands::kColumns / 2], const Operands& operands,
                               const Stages& stages, const Seat& seat) {
  const int lane = seat.thread % 32;
  const uint32_t place = column_operand_offset(lane), left_place = row_operand_offset(lane);
  const uint32_t first_row = (64 * seat.row_group + seat.thread / 32 * 16) * kSwizzleRowBytes;
  operands.each_stage(stages, [&](int, uint32_t stage) {
    const uint32_t right = stage + Operands::kLeft + seat.column_group * Operands::kColumns * 128;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t left[4];
      load_matrices(left, stage + first_row + (left_place ^ 32 * k));
      multiply_columns<Operands::kColumns>(sums, left, right, place ^ 32 * k);
    }
  });
}

}  // namespace loopmdm
