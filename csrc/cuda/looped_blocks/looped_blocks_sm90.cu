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

constexpr int kNobody = -1;  // no phase of the table
constexpr int kFewest =
    Config::kQkvColumns < Config::kAttnOutColumns ? Config::kQkvColumns : Config::kAttnOutColumns;
constexpr int kFewestOfMlp =
    Config::kMlpInColumns < Config::kMlpOutColumns ? Config::kMlpInColumns : Config::kMlpOutColumns;
// Whether one group has all of any tile.
constexpr bool kSomeAlone =
    Config::kColumnGroups > 1 &&
    (Config::kHeadsPerTile == 1 || kFewest <= kAloneColumns || kFewestOfMlp <= kAloneColumns);

// Whether the other group has all of a tile.
__device__ inline bool left_alone(int32_t phase) {
  if (!kSomeAlone || warp_group() == 0) return false;
  if (phase == kAttention) return Config::kHeadsPerTile == 1;
  return columns_of(phase) > 0 && columns_of(phase) <= kAloneColumns;
}

// The stages of such a tile, and its place among the squared norms.
__device__ inline void pass_by(const Parameters& p, const Instruction& item, const Ring& ring,
                               RingPlace& place) {
  const int keys = 2 * ((p.length + Config::kKeyBlock - 1) / Config::kKeyBlock);
  const int stages = item.phase == kAttention ? 1 + keys : steps_of(item.phase);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage, Ring::next(place)) {
    ring.wait_full(place);
    ring.release(place);
  }
  if (Config::kSumRows == 0 && item.phase == kMlpOut && may_exit(p, item)) {
    if (threadIdx.x % 32 == 0) store_change(p, item, change_of(item, Seat()), make_float2(0, 0));
  }
}

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
    switch (left_alone(item.phase) ? kNobody : item.phase) {
      case kNobody:
        if constexpr (kSomeAlone) pass_by(p, item, ring, place);
        break;
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
      case kMlpSum:
        if constexpr (Config::kSumRows > 0) {
          sum_parts(p, item, issued.loop, *reinterpret_cast<SumStatistics*>(ring.queue + 1));
        }
        break;
      case kMlpOut:
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
  if (Config::kBlocks > 1) Ring::meet_all();  // others load for a block, too
}
