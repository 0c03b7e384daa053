// A stack of blocks applied S times as one kernel that never leaves the GPU
// (loopmdm_kernels/schedule/table.py): each block of threads executes its share of the instruction table, for
// every loop. One warp loads, two warp groups compute. The weights are read from device memory once and then
// from L2, whatever S is.
#include "cuda/looped_blocks/attention_sm90.cuh"
#include "cuda/looped_blocks/loader_sm90.cuh"
#include "cuda/looped_blocks/products.cuh"
#include "cuda/looped_blocks/sequence.cuh"

namespace loopmdm {

static_assert(kBarrierBytes % alignof(float2) == 0 && kBarrierBytes + sizeof(SumStatistics) + 1024 <= 2048,
              "statistics behind the ring; FIXED_BYTES of loopmdm_kernels/schedule/plan.py");

// How far apart a group's eights of columns are.
template <int kEights>
struct Columns {
  static constexpr int kApart = kEights;
};

__device__ void compute(const Parameters& p, const Ring& ring) {
  RingPlace place{0, 0}, read{0, 0};
  while (true) {
    const Issued issued = ring.take(read);
    const Seat seat;
    const Instruction& item = issued.item;
    const Columns<1> whole;
    const auto over = [&](int inner, auto columns) {
      return [&, inner](auto& sums, const auto&... norm) {
        constexpr int kApart = decltype(columns)::kApart;
        if constexpr (sizeof...(norm) == 0) {
          shared_product<false, false, kApart>(sums, ring, place, seat, inner / Config::kStep);
        } else {
          stream_product<kApart>(sums, ring, place, seat, norm...);
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
        project_qkv(p, item, issued.loop, seat, over(Config::kHidden, Columns<Config::kQkvApart>()));
        break;
      case kAttention:
        attention(p, item, ring, place, seat);
        break;
      case kAttnOut:
        project_attn_out(p, item, issued.loop, seat, over(Config::kHidden, whole));
        break;
      case kMlpIn:
        project_mlp_in(p, item, seat, over(Config::kHidden, whole));
        break;
      case kMlpSum:
        if constexpr (Config::kSumRows > 0) {
          sum_parts(p, item, issued.loop, *reinterpret_cast<SumStatistics*>(ring.queue + 1));
        }
        break;
      case kMlpOut:
        project_mlp_out(p, item, issued.loop, seat, over(Config::kMlp / Config::kMlpOutParts, whole));
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
