// The phases of the forward pass that are products: what each does before and after. `product` makes the sums
// of the thread, as the architecture can; where it has a norm in front it gets that of the rows and the
// vectors.
#pragma once

#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/parts.cuh"

namespace loopmdm {

// Columns of the tile that a group of warps computes, and the number of its part in the row.
template <int kTileColumns>
constexpr int kShare = kTileColumns / Config::kColumnGroups;

__device__ inline int share_of(const Instruction& item, const Seat& seat) {
  return item.column * Config::kColumnGroups + seat.column_group;
}

template <class Product>
__device__ void project_qkv(const Parameters& p, const Instruction& item, int32_t loop, const Seat& seat,
                            const Product& product) {
  constexpr int kColumns = kShare<Config::kQkvColumns>;
  const int column = share_of(item, seat) * kColumns;
  const auto rows = RowScales::load(p, item, p.statistics1, seat);
  float sums[kColumns / 2];
  product(sums, rows, affine_of(p, item, 0));
  const int slot = qkv_slot(item.write_slot, loop, Config::kLayers);
  if (p.cosines && column < 2 * Config::kHidden) rotate<kColumns>(sums, p, item, seat);
  store_bf16<kColumns>(sums, p.qkv_values, 3 * Config::kHidden, column, p, item,
                       p.token(slot * p.batch + item.sequence, 0), seat);
}

template <class Product>
__device__ void project_attn_out(const Parameters& p, const Instruction& item, int32_t loop, const Seat& seat,
                                 const Product& product) {
  constexpr int kColumns = kShare<Config::kAttnOutColumns>;
  float sums[kColumns / 2];
  product(sums);
  update_stream<kColumns>(sums, p, item, loop, seat, share_of(item, seat), nullptr,
                          gate_of(p, item.layer, item.sequence, 0), p.statistics2, nullptr);
}

template <class Product>
__device__ void project_mlp_in(const Parameters& p, const Instruction& item, const Seat& seat,
                               const Product& product) {
  constexpr int kColumns = kShare<Config::kMlpInColumns>;
  const int column = share_of(item, seat) * kColumns;
  const auto rows = RowScales::load(p, item, p.statistics2, seat);
  float sums[kColumns / 2];
  product(sums, rows, affine_of(p, item, 1));
  add_bias<kColumns>(sums, p.mlp_in_bias + item.layer * Config::kMlp + column, seat);
  apply_gelu(sums);
  store_bf16<kColumns>(sums, p.gelu_values, Config::kMlp, column, p, item, p.token(item.sequence, 0), seat);
}

// MLP_OUT, or the sum of its parts.
template <class Product>
__device__ void project_mlp_out(const Parameters& p, const Instruction& item, int32_t loop, const Seat& seat,
                                const Product& product) {
  constexpr int kColumns = kShare<Config::kMlpOutColumns>;
  float sums[kColumns / 2];
  if (Config::kMlpOutParts > 1 && item.phase == kMlpSum) {
    add_parts<kColumns>(sums, p, item, seat);
  } else {
    product(sums);
    if (Config::kMlpOutParts > 1) return store_part<kColumns>(sums, p, item, seat);
  }
  const bool last = p.adaptive && item.layer == Config::kLayers - 1;
  update_stream<kColumns>(sums, p, item, loop, seat, share_of(item, seat),
                          p.mlp_out_bias + item.layer * Config::kHidden,
                          gate_of(p, item.layer, item.sequence, 1), p.statistics1, last ? p.change : nullptr);
}

}  // namespace loopmdm
