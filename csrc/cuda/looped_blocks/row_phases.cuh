// The phases of the forward pass that go by rows: NORM1, NORM2 and MLP_SUM.
#pragma once

#include "cuda/tile/epilogue.cuh"

namespace loopmdm {

// norm(x) * gain + shift of kRows rows, rounded, by a warp; they follow each other `apart` tokens apart, and
// of them the first `number` are there. The bits are those of a norm on the way into a product.
template <int kRows>
__device__ void normalise_rows(const Parameters& p, int64_t token, int apart, int number, const float* stream,
                               const PartStatistics* statistics, const float4* affine) {
  constexpr int kPairs = Config::kHidden / 64;
  const int lane = threadIdx.x % 32;
  float2 values[kRows][kPairs], norms[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int64_t line = (token + (row < number ? row * apart : 0)) * Config::kHidden + 2 * lane;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) values[row][i] = load_pair(stream + line + 64 * i);
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    norms[row] = row_norm(statistics + (token + (row < number ? row * apart : 0)) * Config::kParts, lane);
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float4 vectors = __ldg(affine + lane + 32 * i);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= number) break;
      const int64_t line = (token + row * apart) * Config::kHidden + 2 * lane;
      store(reinterpret_cast<uint32_t*>(p.rows_values + line + 64 * i),
            modulated(values[row][i], norms[row].x, norms[row].y, vectors));
    }
  }
}

// Rows of the block among those that go through a phase together.
struct RowSpan {
  int first, last;  // of the sequence

  __device__ RowSpan(const Parameters& p, const Instruction& item, int rows)
      : first(item.row * Config::kTileRows + item.column * rows + rank_in_tile() * (rows / Config::kBlocks)),
        last(min(first + rows / Config::kBlocks, p.length)) {}
};

// NORM1 and NORM2, two rows a warp: a row by itself would wait for L2 each time.
__device__ inline void normalise(const Parameters& p, const Instruction& item, int32_t loop) {
  constexpr int kWarps = Config::kComputeThreads / 32, kRows = Config::kHidden <= 1024 ? 2 : 1;
  const int branch = item.phase == kNorm2;
  const RowSpan rows(p, item, Config::kNormRows);
  const float* const stream = stream_in(p, item.read_slot, loop);
#pragma unroll 1
  for (int row = rows.first + threadIdx.x / 32; row < rows.last; row += kRows * kWarps) {
    normalise_rows<kRows>(p, p.token(item.sequence, row), kWarps, (rows.last - row + kWarps - 1) / kWarps,
                          stream, branch ? p.statistics2 : p.statistics1, affine_of(p, item, branch));
  }
}

// What a block's quads have of rows at a time: a part of 32 columns each, in the places of a product's sums.
// So the bits of the statistics are those of a tile.
constexpr int kQuads = Config::kComputeThreads / 4;
constexpr int kRowsAtOnce = kQuads < Config::kParts ? 1 : kQuads / Config::kParts;
constexpr int kSumsTogether = 16;  // parts, and the stream, of 32 columns, in the registers of a quad
using SumStatistics = float2[kQuads];

// A quad's part of a row, on its way through MLP_SUM.
struct SumPart {
  static constexpr int kEights = Config::kPart / 8;
  bool inside;
  int64_t line;  // of its first pair of columns, in a matrix
  float2 parts[Config::kMlpOutTiles][kEights] = {}, old[kEights] = {};

  __device__ void load(const Parameters& p, const float* stream, int64_t matrix) {
    if (!inside) return;  // of a quad that is left over all is 0
#pragma unroll
    for (int part = 0; part < Config::kMlpOutTiles; ++part) {
#pragma unroll
      for (int i = 0; i < kEights; ++i) {
        parts[part][i] = load_pair(p.partial_values + part * matrix + line + 8 * i);
      }
    }
#pragma unroll
    for (int i = 0; i < kEights; ++i) old[i] = load_pair(stream + line + 8 * i);
  }

  // The new stream, as a product's sums of the upper of two rows. Returns its statistics.
  __device__ PartStatistics add(float (&sums)[4 * kEights], const float* gate, const float* bias) const {
    float total = 0;
    clear(sums);
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
#pragma unroll
      for (int part = 0; part < Config::kMlpOutTiles; ++part) {
        sums[4 * i] += parts[part][i].x;
        sums[4 * i + 1] += parts[part][i].y;
      }
      total +=
          add_gated(&sums[4 * i], old[i], load_constant_pair(gate + 8 * i), load_constant_pair(bias + 8 * i));
    }
    return part_statistics(sums, 0, 0, total);
  }
};

// How many rows a quad loads its parts of together: as many as registers hold, as `sum_trips` of
// loopmdm_kernels/schedule/forward.py has it.
constexpr int kMostTurns = kSumsTogether / (Config::kMlpOutTiles + 1);
constexpr int kNeededTurns = (Config::kSumRows / Config::kBlocks + kRowsAtOnce - 1) / kRowsAtOnce;
constexpr int kSumTurns = kNeededTurns < 2 || kMostTurns < 2 ? 1
                          : kNeededTurns < kMostTurns        ? kNeededTurns
                                                             : kMostTurns;

// MLP_SUM: the parts of rows in their order, bias, gate and residual; then the norm that the next layer
// begins with, whose row the quads tell each other of through `shared`.
__device__ inline void sum_parts(const Parameters& p, const Instruction& item, int32_t loop,
                                 SumStatistics& shared) {
  static_assert(Config::kSumRows == 0 || Config::kParts <= kQuads,
                "MOST_SUMMED of loopmdm_kernels/schedule/forward.py");
  constexpr int kEights = SumPart::kEights, kTurns = kSumTurns;
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
  for (int first = rows.first; first < rows.last; first += kTurns * kRowsAtOnce) {
    SumPart loaded[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int row = first + turn * kRowsAtOnce + own_row;
      loaded[turn].inside = own_row < kRowsAtOnce && row < rows.last;
      loaded[turn].line =
          p.token(item.sequence, loaded[turn].inside ? row : first) * Config::kHidden + column;
      loaded[turn].load(p, source, matrix);
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const auto& [inside, line, parts, old] = loaded[turn];
      float sums[4 * kEights];
      const PartStatistics found = loaded[turn].add(sums, gate, bias);
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
  }
  if (exits) {  // the same for all threads
    const float2 of_warp = warp_sums(changed, size);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = of_warp;
    meet<1>(Config::kComputeThreads);
    if (threadIdx.x > 0) return;
    float2 total = shared[0];
    for (int warp = 1; warp < Config::kComputeThreads / 32; ++warp) {
      total = make_float2(total.x + shared[warp].x, total.y + shared[warp].y);
    }
    store_change(p, item, item.column * Config::kBlocks + rank_in_tile(), total);
  }
}

}  // namespace loopmdm
