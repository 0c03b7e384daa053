// The phases of the forward pass that are products: what each does before and after. `product` makes the sums
// of the thread, as the architecture can; where it has a norm in front it gets that of the rows and the
// vectors.
#pragma once

#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/parts.cuh"

namespace loopmdm {

// norm(x) * gain + shift of the block's rows among kNormRows, rounded; a warp a row. The bits are those of a
// norm on the way into a product.
__device__ inline void normalise(const Parameters& p, const Instruction& item, int32_t loop) {
  constexpr int kPairs = Config::kHidden / 64, kRows = Config::kNormRows / Config::kPair;
  const int branch = item.phase == kNorm2;
  const int64_t matrix = static_cast<int64_t>(p.batch) * p.length * Config::kHidden;
  const float* const stream = p.stream_values + stream_slot(item.read_slot, loop, p.keep) * matrix;
  const PartStatistics* const statistics = branch ? p.statistics2 : p.statistics1;
  const Seat seat;
  const int first = item.row * Config::kTileRows + item.column * Config::kNormRows + rank_in_pair() * kRows;
  const int last = min(first + kRows, p.length), lane = seat.thread % 32;
  const int warp = seat.thread / 32 + 4 * (seat.row_group + Config::kRowGroups * seat.column_group);
  const float4* const affine = affine_of(p, item, branch) + lane;
#pragma unroll 1
  for (int row = first + warp; row < last; row += Config::kComputeThreads / 32) {
    const int64_t token = p.token(item.sequence, row), line = token * Config::kHidden + 2 * lane;
    float2 values[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) values[i] = load_pair(stream + line + 64 * i);
    const float2 norm = row_norm(statistics + token * Config::kParts, lane);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      store(reinterpret_cast<uint32_t*>(p.rows_values + line + 64 * i),
            modulated(values[i], norm.x, norm.y, __ldg(affine + 32 * i)));
    }
  }
}

// Columns of the tile that a group of warps computes, and the number of its part in the row.
template <int kTileColumns>
constexpr int kShare = kTileColumns / Config::kColumnGroups;

__device__ inline int share_of(const Instruction& item, const Seat& seat) {
  return item.column * Config::kColumnGroups + seat.column_group;
}

// Of rows that NORM1 or NORM2 has normalised, or of the stream's as they go into the product.
template <int kSums, class Product>
__device__ void of_norm(float (&sums)[kSums], const Parameters& p, const Instruction& item, int branch,
                        const Seat& seat, const Product& product) {
  if constexpr (Config::kNormRows > 0) {
    product(sums);
  } else {
    product(sums, RowScales::load(p, item, branch ? p.statistics2 : p.statistics1, seat),
            affine_of(p, item, branch));
  }
}

// The first columns of a residual tile, which are loaded before its product. The seat is its own: what
// follows from it need not stay in registers until the product ends.
template <int kColumns>
__device__ StreamBatch first_batch(const Parameters& p, const Instruction& item, int32_t loop,
                                   const float* bias, const float* gate) {
  const Seat seat;
  StreamBatch batch;
  batch.load(StreamTile<kColumns>(p, item, seat, share_of(item, seat)), stream_in(p, item.read_slot, loop),
             bias, gate, 0);
  return batch;
}

template <class Product>
__device__ void project_qkv(const Parameters& p, const Instruction& item, int32_t loop, const Seat& seat,
                            const Product& product) {
  constexpr int kColumns = kShare<Config::kQkvColumns>;
  const int column = share_of(item, seat) * kColumns;
  float sums[kColumns / 2];
  of_norm(sums, p, item, 0, seat, product);
  const int slot = qkv_slot(item.write_slot, loop, Config::kLayers);
  if (p.cosines && column < 2 * Config::kHidden) rotate<kColumns>(sums, p, item, seat);
  store_bf16<kColumns>(sums, p.qkv_values, 3 * Config::kHidden, column, p, item,
                       p.token(slot * p.batch + item.sequence, 0), seat);
}

template <class Product>
__device__ void project_attn_out(const Parameters& p, const Instruction& item, int32_t loop, const Seat& seat,
                                 const Product& product) {
  constexpr int kColumns = kShare<Config::kAttnOutColumns>;
  const float* const gate = gate_of(p, item.layer, item.sequence, 0);
  StreamBatch batch = first_batch<kColumns>(p, item, loop, nullptr, gate);
  float sums[kColumns / 2];
  product(sums);
  update_stream<kColumns>(sums, batch, p, item, loop, seat, share_of(item, seat), nullptr, gate,
                          p.statistics2, nullptr);
}

template <class Product>
__device__ void project_mlp_in(const Parameters& p, const Instruction& item, const Seat& seat,
                               const Product& product) {
  constexpr int kColumns = kShare<Config::kMlpInColumns>;
  const int column = share_of(item, seat) * kColumns;
  float sums[kColumns / 2];
  of_norm(sums, p, item, 1, seat, product);
  add_bias<kColumns>(sums, p.mlp_in_bias + item.layer * Config::kMlp + column, seat);
  apply_gelu(sums);
  store_bf16<kColumns>(sums, p.gelu_values, Config::kMlp, column, p, item, p.token(item.sequence, 0), seat);
}

// MLP_OUT, one of its parts, or their sum: in their order, so that the bits are the same.
template <class Product>
__device__ void project_mlp_out(const Parameters& p, const Instruction& item, int32_t loop, const Seat& seat,
                                const Product& product) {
  constexpr int kColumns = kShare<Config::kMlpOutColumns>;
  float sums[kColumns / 2];
  if (Config::kMlpOutTiles > 1 && item.phase == kMlpOut) {
    product(sums);
    return store_part<kColumns>(sums, p, item, seat);
  }
  const float* const bias = p.mlp_out_bias + item.layer * Config::kHidden;
  const float* const gate = gate_of(p, item.layer, item.sequence, 1);
  constexpr bool kAllParts = Config::kMlpOutParts > Config::kMlpOutTiles;
  constexpr bool kLate = kAllParts && kColumns > 96;  // two sums leave no registers for the stream
  StreamBatch batch;
  if constexpr (!kLate) batch = first_batch<kColumns>(p, item, loop, bias, gate);
  if constexpr (kAllParts) {
    clear(sums);
#pragma unroll 1
    for (int part = 0; part < Config::kMlpOutParts; ++part) {
      float own[kColumns / 2];
      product(own);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[i] += own[i];
    }
  } else if constexpr (Config::kMlpOutTiles > 1) {
    add_parts<kColumns>(sums, p, item, seat);
  } else {
    product(sums);
  }
  if constexpr (kLate) batch = first_batch<kColumns>(p, item, loop, bias, gate);
  const bool last = p.adaptive && item.layer == Config::kLayers - 1;
  update_stream<kColumns>(sums, batch, p, item, loop, seat, share_of(item, seat), bias, gate, p.statistics1,
                          last ? p.change : nullptr);
}

}  // namespace loopmdm
