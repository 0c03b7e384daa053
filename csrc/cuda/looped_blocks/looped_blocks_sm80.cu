// A stack of blocks applied S times as one kernel (see looped_blocks_sm90.cu), for GPUs without TMA and
// WGMMA: all warps load by asynchronous copies and compute by mma.sync.
#include "cuda/looped_blocks/attention_sm80.cuh"
#include "cuda/looped_blocks/sequence.cuh"
#include "cuda/looped_blocks/walk_sm80.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/parts.cuh"

namespace loopmdm {

__device__ void project_qkv(const KernelParameters& p, Walk& walk, const Seat& seat) {
  const Instruction& item = walk.item();
  const auto operands = walk.operands<4, Config::kHidden, Config::kQkvColumns>(
      p.stream_values, stream_slot(item.read_slot, walk.loop(), p.keep), p.qkv_weight, 3 * Config::kHidden);
  constexpr int kColumns = decltype(operands)::kColumns;
  const auto rows = RowScales::load(p, item, p.statistics1, seat);
  float sums[kColumns / 2] = {};
  stream_product(sums, operands, walk.stages(), seat, rows, p.affine_of(item, 0));
  walk.read_all();
  const int column = (item.column * Config::kColumnGroups + seat.column_group) * kColumns;
  const int slot = qkv_slot(item.write_slot, walk.loop(), Config::kLayers);
  if (p.cosines && column < 2 * Config::kHidden) rotate<kColumns>(sums, p, item, seat);
  store_bf16<kColumns>(sums, p.qkv_values, 3 * Config::kHidden, column, p, item,
                       p.token(slot * p.batch + item.sequence, 0), seat);
}

__device__ void project_attn_out(const KernelParameters& p, Walk& walk, const Seat& seat) {
  const Instruction& item = walk.item();
  const auto operands = walk.operands<2, Config::kHidden, Config::kAttnOutColumns>(
      p.mixed_values, 0, p.attn_out_weight, Config::kHidden);
  constexpr int kColumns = decltype(operands)::kColumns;
  float sums[kColumns / 2] = {};
  shared_product(sums, operands, walk.stages(), seat);
  walk.read_all();
  update_stream<kColumns>(sums, p, item, walk.loop(), seat,
                          item.column * Config::kColumnGroups + seat.column_group, nullptr,
                          p.gate_of(item, 0), p.statistics2, nullptr);
}

__device__ void project_mlp_in(const KernelParameters& p, Walk& walk, const Seat& seat) {
  const Instruction& item = walk.item();
  const auto operands = walk.operands<4, Config::kHidden, Config::kMlpInColumns>(
      p.stream_values, stream_slot(item.read_slot, walk.loop(), p.keep), p.mlp_in_weight, Config::kMlp);
  constexpr int kColumns = decltype(operands)::kColumns;
  const auto rows = RowScales::load(p, item, p.statistics2, seat);
  float sums[kColumns / 2] = {};
  stream_product(sums, operands, walk.stages(), seat, rows, p.affine_of(item, 1));
  walk.read_all();
  const int column = (item.column * Config::kColumnGroups + seat.column_group) * kColumns;
  add_bias_gelu<kColumns>(sums, p.mlp_in_bias + item.layer * Config::kMlp + column, seat);
  store_bf16<kColumns>(sums, p.gelu_values, Config::kMlp, column, p, item, p.token(item.sequence, 0), seat);
}

__device__ void project_mlp_out(const KernelParameters& p, Walk& walk, const Seat& seat) {
  const Instruction& item = walk.item();
  constexpr int kColumns = Config::kMlpOutColumns / Config::kColumnGroups;
  float sums[kColumns / 2] = {};
  if (Config::kMlpOutParts > 1 && item.phase == kMlpSum) {
    walk.read_all();
    add_parts<kColumns>(sums, p, item, seat);
  } else {
    const auto operands = walk.operands<2, Config::kMlp, Config::kMlpOutColumns, Config::kMlpOutParts>(
        p.gelu_values, 0, p.mlp_out_weight, Config::kHidden);
    shared_product(sums, operands, walk.stages(), seat);
    walk.read_all();
    if (Config::kMlpOutParts > 1) return store_part<kColumns>(sums, p, item, seat);
  }
  const bool last = p.adaptive && item.layer == Config::kLayers - 1;
  update_stream<kColumns>(sums, p, item, walk.loop(), seat,
                          item.column * Config::kColumnGroups + seat.column_group,
                          p.mlp_out_bias + item.layer * Config::kHidden, p.gate_of(item, 1), p.statistics1,
                          last ? p.change : nullptr);
}

__device__ void execute(const KernelParameters& p, Walk& walk) {
  const Seat seat;
  const Instruction& item = walk.item();
  switch (item.phase) {
    case kEnter:
      return enter(p, item, walk.loop());
    case kQkv:
      return project_qkv(p, walk, seat);
    case kAttention:
      return attention(p, item, walk.loop(), walk.stages(), seat, [&walk] { walk.read_all(); });
    case kAttnOut:
      return project_attn_out(p, walk, seat);
    case kMlpIn:
      return project_mlp_in(p, walk, seat);
    case kMlpOut:
    case kMlpSum:
      return project_mlp_out(p, walk, seat);
    case kExit:
      return decide(p, item, walk.loop());
    case kLeave:
      return leave(p, item, walk.loop());
    default:
      return;
  }
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::Config::kComputeThreads, 1)
    looped_blocks_sm80(const __grid_constant__ loopmdm::KernelParameters parameters) {
  using namespace loopmdm;
  Walk walk(parameters, dynamic_shared_memory());
  while (walk.next()) {
    execute(parameters, walk);
    walk.complete();
  }
}
