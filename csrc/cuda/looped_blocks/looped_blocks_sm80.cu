// A stack of blocks applied S times as one kernel (see looped_blocks_sm90.cu), for GPUs without TMA and
// WGMMA: all warps load by asynchronous copies and compute by mma.sync.
#include "cuda/looped_blocks/attention_sm80.cuh"
#include "cuda/looped_blocks/products.cuh"
#include "cuda/looped_blocks/sequence.cuh"
#include "cuda/looped_blocks/walk_sm80.cuh"

namespace loopmdm {

static_assert(Config::kMlpOutTiles == Config::kMlpOutParts, "a tile has one part of MLP_OUT");
static_assert(Config::kHeadsPerTile == Config::kColumnGroups, "each group has a head in attention");

__device__ void execute(const KernelParameters& p, Walk& walk) {
  const Seat seat;
  const Instruction& item = walk.item();
  const int32_t loop = walk.loop(), slot = stream_slot(item.read_slot, loop, p.keep);
  // `operands` says what is multiplied; the stages are then free for the weights of the next tile. With the
  // norms of rows and their vectors these are normalised on their way.
  const auto over = [&](auto operands) {
    return [&, operands](auto& sums, const auto&... norm) {
      clear(sums);
      if constexpr (sizeof...(norm) == 0) {
        shared_product(sums, operands, walk.stages(), seat);
      } else {
        stream_product(sums, operands, walk.stages(), seat, norm...);
      }
      walk.read_all();
    };
  };
  constexpr int kHidden = Config::kHidden, kMlp = Config::kMlp;
  switch (item.phase) {
    case kEnter:
      return enter(p, item, loop);
    case kQkv: {
      const void* const stream = p.stream_values;
      return project_qkv(p, item, loop, seat,
                         over(walk.operands<kQkvBytes, kHidden, Config::kQkvColumns>(
                             Config::kNormalQkv ? p.rows_values : stream, Config::kNormalQkv ? 0 : slot,
                             p.qkv_weight, 3 * kHidden)));
    }
    case kAttention:
      return attention(p, item, loop, walk.stages(), seat, [&walk] { walk.read_all(); });
    case kAttnOut:
      return project_attn_out(p, item, loop, seat,
                              over(walk.operands<2, kHidden, Config::kAttnOutColumns>(
                                  p.mixed_values, 0, p.attn_out_weight, kHidden)));
    case kMlpIn:
      return project_mlp_in(p, item, seat,
                            over(walk.operands<4, kHidden, Config::kMlpInColumns>(p.stream_values, slot,
                                                                                  p.mlp_in_weight, kMlp)));
    case kMlpSum:
      if constexpr (Config::kSumRows > 0) {
        walk.read_all();
        sum_parts(p, item, loop, walk.statistics());
      }
      return;
    case kMlpOut:
      return project_mlp_out(p, item, loop, seat,
                             over(walk.operands<2, kMlp, Config::kMlpOutColumns, Config::kMlpOutTiles>(
                                 p.gelu_values, 0, p.mlp_out_weight, kHidden)));
    case kExit:
      return decide(p, item, loop);
    case kLeave:
      return leave(p, item, loop);
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
