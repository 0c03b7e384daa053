// The phases of the forward pass that are products: what each does before and after. `product` makes the sums
// of the thread, as the architecture can; where it has a norm in front it gets that of the rows and the
// vectors.
#pragma once

#include "cuda/tile/epilogue.cuh"

namespace loopmdm {

// Groups of warps that share the columns of a tile; columns that each has, and the number of its part in the
// row.
template <int kTileColumns>
constexpr int kSharing = kTileColumns <= kAloneColumns ? 1 : Config::kColumnGroups;
template <int kTileColumns>
constexpr int kShare = kTileColumns / kSharing<kTileColumns>;

template <int kTileColumns>
__device__ int share_of(const Instruction& item, const Seat& seat) {
  return column_of(item) * kSharing<kTileColumns> + seat.column_group;
}

// Of rows that are normalised, or of the stream's as they go into the product.
template <bool kNormal, int kSums, class Product>
__device__ void of_norm(float (&sums)[kSums], const Parameters& p, const Instruction& item, int branch,
                        const Seat& seat, const Product& product) {
  if constexpr (kNormal) {
    product(sums);
  } else {
    product(sums, RowScales::load(p, item, branch ? p.statistics2 : p.statistics1, seat),
            affine_of(p, item, branch));
  }
}

// The first columns of a residual tile, which are loaded before its product. The seat is its own: what
// follows from it need not stay in registers until the product ends.
template <int kTileColumns>
__device__ StreamBatch first_batch(const Parameters& p, const Instruction& item, int32_t loop,
                                   const float* bias, const float* gate) {
  const Seat seat;
  StreamBatch batch;
  const StreamTile<kShare<kTileColumns>> tile(p, item, seat, share_of<kTileColumns>(item, seat));
  batch.load(tile, stream_in(p, item.read_slot, loop), bias, gate, 0);
  return batch;
}

template <class Product>
__device__ void project_qkv(const Parameters& p, const Instruction& item, int32_t loop, const Seat& seat,
                            const Product& product) {
  constexpr int kColumns = kShare<Config::kQkvColumns>;
  static_assert(kColumns % Config::kHeadDim == 0 && 2 * Config::kHidden % kColumns == 0,
                "a group has whole heads, and rotates all that it has or nothing");
  const int column = share_of<Config::kQkvColumns>(item, seat) * kColumns;
  float sums[kColumns / 2];
  of_norm<Config::kNormalQkv>(sums, p, item, 0, seat, product);
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
  StreamBatch batch = first_batch<Config::kAttnOutColumns>(p, item, loop, nullptr, gate);
  float sums[kColumns / 2];
  product(sums);
  update_stream<kColumns>(sums, batch, p, item, loop, seat, share_of<Config::kAttnOutColumns>(item, seat),
                          nullptr, gate, p.statistics2, false);
}

template <class Product>
__device__ void project_mlp_in(const Parameters& p, const Instruction& item, const Seat& seat,
                               const Product& product) {
  constexpr int kColumns = kShare<Config::kMlpInColumns>;
  const int column = share_of<Config::kMlpInColumns>(item, seat) * kColumns;
  float sums[kColumns / 2];
  of_norm<Config::kNormalMlpIn>(sums, p, item, 1, seat, product);
  add_bias<kColumns>(sums, p.mlp_in_bias + item.layer * Config::kMlp + column, seat);
  apply_gelu(sums);
  store_bf16<kColumns>(sums, p.gelu_values, Config::kMlp, column, p, item, p.token(item.sequence, 0), seat);
}

// MLP_OUT, or one of its parts. One tile adds those that it has in their order, as MLP_SUM does: to the same
// bits.
template <class Product>
__device__ void project_mlp_out(const Parameters& p, const Instruction& item, int32_t loop, const Seat& seat,
                                const Product& product) {
  constexpr int kColumns = kShare<Config::kMlpOutColumns>;
  const int share = share_of<Config::kMlpOutColumns>(item, seat);
  float sums[kColumns / 2];
  if constexpr (Config::kSumRows > 0) {
    product(sums);
    return store_part<kColumns>(sums, p, item, seat, share);
  }
  const float* const bias = p.mlp_out_bias + item.layer * Config::kHidden;
  const float* const gate = gate_of(p, item.layer, item.sequence, 1);
  constexpr bool kAllParts = Config::kMlpOutParts > Config::kMlpOutTiles;
  constexpr bool kLate = kAllParts && kColumns > 96;  // two sums leave no registers for the stream
  StreamBatch batch;
  if constexpr (!kLate) batch = first_batch<Config::kMlpOutColumns>(p, item, loop, bias, gate);
  if constexpr (kAllParts) {
    clear(sums);
#pragma unroll 1
    for (int part = 0; part < Config::kMlpOutParts; ++part) {
      float own[kColumns / 2];
      product(own);
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[i] += own[i];
    }
  } else {
    product(sums);
  }
  if constexpr (kLate) batch = first_batch<Config::kMlpOutColumns>(p, item, loop, bias, gate);
  update_stream<kColumns>(sums, batch, p, item, loop, seat, share, bias, gate, p.statistics1,
                          may_exit(p, item));
}

}  // namespace loopmdm
