// Sums of one warp group over the stages of a product: 64 rows by kColumns.
#pragma once

#include "common/matrix_descriptor.h"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/ring_sm90.cuh"
#include "cuda/tile/rows.cuh"

namespace loopmdm {

// Sums are cleared although the first product would not read them. Without a value they are alive, for the
// assembler, from the beginning of the kernel, those of all phases at once; the registers then do not
// suffice, and it serialises the products.

// norm(x) * gain + shift, times weights. The left operand of a stage is made in registers while the products
// of the stage before run; two sets of registers alternate.
template <int kSums>
__device__ void stream_product(float (&sums)[kSums], const Ring& ring, RingPlace& place, const Seat& seat,
                               const RowScales& rows, const float4* affine) {
  constexpr int kColumns = 2 * kSums, kSteps = Config::kHidden / Config::kStep;
  constexpr uint32_t kLeft = 4 * Config::kRows * Config::kStep;
  const StreamReader reader(seat, affine);
  uint32_t operands[2][4][4];
  clear(sums);
  RingPlace before = place;

  const auto stage = [&](uint32_t (&operand)[4][4], int step) {
    StreamReader::Vectors vectors;
    reader.load_vectors(vectors, step * Config::kStep);
    ring.wait_full(place);
    reader.read_stage(operand, ring.stage(place), vectors, rows);
    const uint32_t right = ring.stage(place) + kLeft + seat.column_group * kColumns * 128;
    products_begin(sums, operand);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      WarpGroupProduct<kColumns>::template registers<false>(sums, operand[k],
                                                            inner_major_descriptor(right, k), step + k > 0);
    }
    products_commit();
    products_wait<1>();
    if (step > 0) ring.release(before);
    before = place;
    Ring::next(place);
  };

#pragma unroll 1
  for (int step = 0; step + 1 < kSteps; step += 2) {
    stage(operands[0], step);
    stage(operands[1], step + 1);
  }
  if (kSteps % 2) stage(operands[0], kSteps - 1);
  products_wait<0>();
  pin(sums);
  ring.release(before);
}

// Both operands from shared memory, in panels of 64 rows, or of 64 columns where these are the outer
// dimension.
template <bool kLeftOuter = false, bool kRightOuter = false, int kSums>
__device__ void shared_product(float (&sums)[kSums], const Ring& ring, RingPlace& place, const Seat& seat,
                               int steps) {
  constexpr int kColumns = 2 * kSums;
  constexpr uint32_t kPanel = 64 * 128, kLeft = 2 * Config::kRows * Config::kStep;
  const auto multiply = [&](RingPlace at, int step) {
    const uint32_t left = ring.stage(at) + seat.row_group * kPanel;
    const uint32_t right = ring.stage(at) + kLeft + seat.column_group * kColumns * 128;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t rows =
          kLeftOuter ? outer_major_descriptor(left, kPanel, k) : inner_major_descriptor(left, k);
      const uint64_t columns =
          kRightOuter ? outer_major_descriptor(right, kPanel, k) : inner_major_descriptor(right, k);
      WarpGroupProduct<kColumns>::template shared<kLeftOuter, kRightOuter>(sums, rows, columns, step + k > 0);
    }
  };
  clear(sums);
  multiply_stages(sums, ring, place, steps, multiply, [](RingPlace) {});
}

}  // namespace loopmdm
