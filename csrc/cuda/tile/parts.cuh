// Sums over a part of the inner dimension, which wait in global memory for the others: every thread finds its
// own again. Parts are added in their order, so the bits do not depend on who was first.
#pragma once

#include "cuda/tile/rows.cuh"

namespace loopmdm {

// Where a group's sums of a part lie: four of each thread side by side, [columns / 8, 128].
template <int kColumns>
__device__ float4* part_of(const Parameters& p, const Instruction& item, int part, const Seat& seat) {
  constexpr int kTiles = Config::kHidden / Config::kMlpOutColumns;
  const int64_t row = static_cast<int64_t>(item.sequence) * p.row_tiles + item.row;
  const int64_t tile = (row * kTiles + item.column) * Config::kMlpOutTiles + part;
  const int group =
      seat.row_group + Config::kRowGroups * (seat.column_group + Config::kColumnGroups * rank_in_pair());
  return p.partial_values + (tile * Config::kGroups * Config::kPair + group) * (kColumns / 8) * 128 +
         seat.thread;
}

// Whether the warp has a row of the sequence; if not it leaves its part alone.
__device__ inline bool has_rows(const Parameters& p, const Instruction& item, const Seat& seat) {
  return item.row * Config::kTileRows + seat.row / 16 * 16 < p.length;
}

template <int kColumns>
__device__ void store_part(const float (&sums)[kColumns / 2], const Parameters& p, const Instruction& item,
                           const Seat& seat) {
  if (!has_rows(p, item, seat)) return;
  float4* const target = part_of<kColumns>(p, item, item.part, seat);
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    store(target + 128 * i, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  }
}

template <int kColumns>
__device__ void add_parts(float (&sums)[kColumns / 2], const Parameters& p, const Instruction& item,
                          const Seat& seat) {
  clear(sums);
  if (!has_rows(p, item, seat)) return;
#pragma unroll 1
  for (int part = 0; part < Config::kMlpOutTiles; ++part) {
    const float4* const source = part_of<kColumns>(p, item, part, seat);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const float4 four = __ldcg(source + 128 * i);
      sums[4 * i] += four.x;
      sums[4 * i + 1] += four.y;
      sums[4 * i + 2] += four.z;
      sums[4 * i + 3] += four.w;
    }
  }
}

}  // namespace loopmdm
