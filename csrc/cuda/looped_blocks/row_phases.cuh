// The phases of the forward pass that go by rows: NORM1, NORM2 and MLP_SUM.
#pragma once

#include "cuda/tile/epilogue.cuh"

namespace loopmdm {

// norm(x) * gain + shift of a row, rounded, by a warp. The bits are those of a norm on the way into a product.
__device__ inline void normalise_row(const Parameters& p, int64_t token, const float* stream,
                                     const PartStatistics* statistics, const float4* affine) {
  constexpr int kPairs = Config::kHidden / 64;
  const int lane = threadIdx.x % 32;
  const int64_t line = token * Config::kHidden + 2 * lane;
  float2 values[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) values[i] = load_pair(stream + line + 64 * i);
  const float2 norm = row_norm(statistics + token * Config::kParts, lane);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    store(reinterpret_cast<uint32_t*>(p.rows_values + line + 64 * i),
          modulated(values[i], norm.x, norm.y, __ldg(affine + lane + 32 * i)));
  }
}

// Rows of the block among those that go through a phase together.
struct RowSpan {
  int first, last;  // of the sequence

  __device__ RowSpan(const Parameters& p, const Instruction& item, int rows)
      : first(item.row * Config::kTileRows + item.column * rows + rank_in_pair() * (rows / Config::kPair)),
        last(min(first + rows / Config::kPair, p.length)) {}
};

// NORM1 and NORM2, a warp a row.
__device__ inline void normalise(const Parameters& p, const Instruction& item, int32_t loop) {
  const int branch = item.phase == kNorm2;
  const RowSpan rows(p, item, Config::kNormRows);
  const float* const stream = stream_in(p, item.read_slot, loop);
#pragma unroll 1
  for (int row = rows.first + threadIdx.x / 32; row < rows.last; row += Config::kComputeThreads / 32) {
    normalise_row(p, p.token(item.sequence, row), stream, branch ? p.statistics2 : p.statistics1,
                  affine_of(p, item, branch));
  }
}

// What a block's quads have of rows at a time: a part of 32 columns each, in the places of a product's sums.
// So the bits of the statistics are those of a tile.
constexpr int kQuads = Config::kComputeThreads / 4, kRowsAtOnce = kQuads / Config::kParts;
using SumStatistics = float2[kQuads];

// MLP_SUM: the parts of rows in their order, bias, gate and residual; then the norm that the next layer
// begins with, whose row the quads tell each other of through `shared`.
__device__ inline void sum_parts(const Parameters& p, const Instruction& item, int32_t loop,
                                 SumStatistics& shared) {
  static_assert(Config::kSumRows == 0 || kRowsAtOnce > 0, "MOST_SUMMED of loopmdm_kernels/schedule/plan.py");
  constexpr int kEights = Config::kPart / 8;
  const int quad = threadIdx.x / 4, lane = threadIdx.x % 4;
  const int own_row = quad / Config::kParts, column = quad % Config::kParts * Config::kPart + 2 * lane;
  const int64_t matrix = static_cast<int64_t>(p.batch) * p.length * Config::kHidden;
  const float* const source = stream_in(p, item.read_slot, loop);
  float* const target = stream_in(p, item.write_slot, loop);
  const float* const bias = p.mlp_out_bias + item.layer * Config::kHidden + column;
  const float* const gate = gate_of(p, item.layer, item.sequence, 1) + column;
  Instruction next = item;
  next.layer = (item.layer + 1) % Config::kLayers;
  const float4* const affine = affine_of(p, next, 0) + column / 2;
  const bool exits = may_exit(p, item);
  const RowSpan rows(p, item, Config::kSumRows);
  float changed = 0, size = 0;
#pragma unroll 1
  for (int first = rows.first; first < rows.last; first += kRowsAtOnce) {
    const bool inside = own_row < kRowsAtOnce && first + own_row < rows.last;
    const int64_t line = p.token(item.sequence, inside ? first + own_row : first) * Config::kHidden + column;
    float2 parts[Config::kMlpOutTiles][kEights], old[kEights];
#pragma unroll
    for (int part = 0; part < Config::kMlpOutTiles; ++part) {
#pragma unroll
      for (int i = 0; i < kEights; ++i) parts[part][i] = load_pair(p.partial_values + part * matrix + line + 8 * i);
    }
#pragma unroll
    for (int i = 0; i < kEights; ++i) old[i] = load_pair(source + line + 8 * i);
    float sums[4 * kEights], total = 0;
    clear(sums);
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
#pragma unroll
      for (int part = 0; part < Config::kMlpOutTiles; ++part) {
        sums[4 * i] += parts[part][i].x;
        sums[4 * i + 1] += parts[part][i].y;
      }
      total += add_gated(&sums[4 * i], old[i], load_constant_pair(gate + 8 * i), load_constant_pair(bias + 8 * i));
    }
    const PartStatistics found = part_statistics(sums, 0, 0, total);
    if (lane == 0) shared[quad] = make_float2(found.mean, found.deviations);
    meet<1>(Config::kComputeThreads);
    const float2* const of_row = shared + (inside ? own_row : 0) * Config::kParts;
    const float2 norm = merged_norm(threadIdx.x, [&](int part) { return of_row[part]; });
    uint32_t words[kEights];
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      const float2 value = make_float2(sums[4 * i], sums[4 * i + 1]);
      words[i] = modulated(value, norm.x, norm.y, __ldg(affine + 4 * i));
      if (!inside) continue;
      store_pair(target + line + 8 * i, value);
      if (!exits) continue;
      const float2 input = load_pair(stream_in(p, 0, loop) + line + 8 * i);
      changed += (value.x - input.x) * (value.x - input.x) + (value.y - input.y) * (value.y - input.y);
      size += value.x * value.x + value.y * value.y;
    }
    transpose_quad(words);
    if (inside) {
      store(reinterpret_cast<uint4*>(p.rows_values + line + 6 * lane),
            make_uint4(words[0], words[1], words[2], words[3]));
    }
    meet<1>(Config::kComputeThreads);
  }
  if (exits) {
    constexpr int kWarps = Config::kComputeThreads / 32;
    const int place = (item.column * Config::kPair + rank_in_pair()) * kWarps + threadIdx.x / 32;
    store_change(p, item, place, changed, size);
  }
}

}  // namespace loopmdm
