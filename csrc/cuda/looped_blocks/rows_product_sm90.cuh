// Products of weights, as left operand, and the block's eight tokens, as right operand: a thread holds two
// features, eight apart, of two tokens that follow each other.
#pragma once

#include "common/matrix_descriptor.h"
#include "cuda/looped_blocks/rows_config_sm90.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/row_math.cuh"

namespace loopmdm {

namespace looped_rows {

constexpr int kAll = 1, kGroup = 2;  // the hardware's barriers: of all that compute, of a group of warps

__device__ inline void meet_all() { meet<kAll>(kComputeThreads); }

// Where a thread stands: its group's share of a stage, its features and tokens.
struct Seat {
  int thread, group;

  __device__ Seat() : thread(static_cast<int>(threadIdx.x) % 128), group(warp_group()) {}

  __device__ void meet_group() const { meet_at<128>(kGroup + group); }
  __device__ int warp() const { return thread / 32; }
  // Of number `i` of four sums.
  __device__ int row(int i) const { return fragment_row(thread, i); }
  __device__ int token(int i) const { return fragment_column(thread, i); }
  // The first eight of a stage's features, in eights, of a product that takes every kApart-th.
  template <int kApart = 1>
  __device__ int first_eight() const {
    static_assert(kApart == 1 || kApart == kGroups, "a group's half, or every second");
    return kApart > 1 ? group : 8 * group;
  }
  template <int kApart = 1>
  __device__ int feature(int tile, int i) const {
    return kFeatures * tile + 8 * (first_eight<kApart>() + kApart * (row(i) / 8)) + row(i) % 8;
  }
  // Of two rows that follow each other, of which `in_pairs` gives the values: the first, and the token.
  __device__ int pair_row(int i) const { return row(i) & ~1; }
  __device__ int pair_token() const { return token(0) + (thread / 4 & 1); }
};

// Of one row's values for two tokens, by lanes that hold every row: two rows' values for one token.
__device__ inline float2 in_pairs(float first, float second) {
  const bool upper = (threadIdx.x & 4) != 0;
  const float got = __shfl_xor_sync(~0u, upper ? first : second, 4);
  return upper ? make_float2(got, second) : make_float2(first, got);
}

// An operand so many steps of 16 further in its panel.
__device__ inline uint64_t further(uint64_t descriptor, int steps) { return descriptor + 2 * steps; }

struct Nothing {
  __device__ void operator()(int, int) const {}
};

// The next kTileNumber * kSteps stages: sums of one tile of features after the other. Of each finished tile
// `work` is done in kSteps pieces, one a step of the next tile.
template <int kTileNumber, int kSteps, int kApart = 1, class Work = Nothing>
__device__ void multiply(float (&sums)[kTileNumber][4], const Ring& ring, RingPlace& place, const Seat& seat,
                         uint32_t rows, const Work& work = {}) {
  RingPlace before = place;
#pragma unroll
  for (int tile = 0; tile < kTileNumber; ++tile) clear(sums[tile]);
#pragma unroll
  for (int tile = 0; tile < kTileNumber; ++tile) {
#pragma unroll(kSteps <= 2 ? kSteps : 1)
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t stage = __shfl_sync(~0u, ring.stage(place), 0);  // known to be the same for all lanes
      const uint32_t first = stage + 8 * 128 * seat.first_eight<kApart>();
      const uint64_t weights = inner_major_descriptor(first, 0, kSwizzleRowBytes, kApart);
      const uint64_t right = inner_major_descriptor(rows + step * kRows * 128, 0);
      ring.wait_full(place);
      products_begin(sums[tile]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        WarpGroupProduct<kRows>::template shared<>(sums[tile], further(weights, k), further(right, k),
                                                   step + k > 0);
      }
      products_commit();
      products_wait<1>();
      if (tile + step > 0) ring.release(before);
      before = place;
      Ring::next(place);
      if (tile == 0) continue;
      if (step == 0) pin(sums[tile - 1]);
      work(tile - 1, step);
    }
  }
  products_wait<0>();
  pin(sums[kTileNumber - 1]);
  ring.release(before);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) work(kTileNumber - 1, step);
}

// Two columns of a token, where a product finds them as right operand of `rows` rows.
__device__ inline void store_operand(uint32_t operand, int rows, int row, int column, uint32_t word) {
  store_shared(operand + panel_offset(row, column, rows, 2), word);
}

}  // namespace looped_rows

}  // namespace loopmdm
