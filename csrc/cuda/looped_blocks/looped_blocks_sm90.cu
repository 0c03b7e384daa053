// A stack of blocks applied S times as one kernel that never leaves the GPU
// (loopmdm_kernels/schedule/table.py): each block of threads executes its share of the instruction table, for
// every loop. One warp loads, two warp groups compute. The weights are read from device memory once and then
// from L2, whatever S is.
#include "cuda/looped_blocks/attention_sm90.cuh"
#include "cuda/looped_blocks/loader_sm90.cuh"
#include "cuda/looped_blocks/products.cuh"
#include "cuda/looped_blocks/sequence.cuh"

namespace loopmdm {

__device__ void compute(const Parameters& p, const Ring& ring) {
  RingPlace place{0, 0}, read{0, 0};
  while (true) {
    const Issued issued = ring.take(read);
    const Seat seat;
    const Instruction& item = issued.item;
    const auto over = [&](int inner) {
      return [&, inner](auto& sums, const auto&... norm) {
        if constexpr (sizeof...(norm) == 0) {
          shared_product(sums, ring, place, seat, inner / Config::kStep);
        } else {
          stream_product(sums, ring, place, seat, norm...);
        }
      };
    };
    switch (item.phase) {
      case kEnter:
        enter(p, item, issued.loop);
        break;
      case kNorm1:
      case kNorm2:
        if constexpr (Config::kNormRows > 0) normalise(p, item, issued.loop);
        break;
      case kQkv:
        project_qkv(p, item, issued.loop, seat, over(Config::kHidden));
        break;
      case kAttention:
        attention(p, item, ring, place, seat);
        break;
      case kAttnOut:
        project_attn_out(p, item, issued.loop, seat, over(Config::kHidden));
        break;
      case kMlpIn:
        project_mlp_in(p, item, seat, over(Config::kHidden));
        break;
      case kMlpOut:
      case kMlpSum:
        project_mlp_out(p, item, issued.loop, seat, over(Config::kMlp / Config::kMlpOutParts));
        break;
      case kExit:
        decide(p, item, issued.loop);
        break;
      case kLeave:
        leave(p, item, issued.loop);
        break;
      default:
        return;
    }
    ring.complete(read, p.counters);
  }
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kThreads, 1)
    looped_blocks_sm90(const __grid_constant__ loopmdm::KernelParameters parameters) {
  using namespace loopmdm;
  const Ring ring(dynamic_shared_memory());
  if (threadIdx.x == 0) ring.initialise();
  Ring::meet_all();
  load_and_compute<kLoadRegisters>([&] { Loader(parameters, ring).run(); },
                                   [&] { compute(parameters, ring); });
  if (Config::kPair > 1) Ring::meet_all();  // a block of a pair gets what the other one loads
}
