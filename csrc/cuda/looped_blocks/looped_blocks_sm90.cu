// A stack of blocks applied S times as one kernel that never leaves the GPU
// (loopmdm_kernels/schedule/table.py): each block of threads executes its share of the instruction table, for
// every loop. One warp loads, two warp groups compute. The weights are read from device memory once and then
// from L2, whatever S is.
#include "cuda/looped_blocks/attention_sm90.cuh"
#include "cuda/looped_blocks/loader_sm90.cuh"
#include "cuda/looped_blocks/sequence.cuh"
#include "cuda/tile/parts.cuh"

namespace loopmdm {

// Columns of the tile that a warp group computes, and the number of its part in the row.
template <int kTileColumns>
struct Share {
  static constexpr int kColumns = kTileColumns / Config::kColumnGroups;
  __device__ static int part(const Instruction& item, const Seat& seat) {
    return item.column * Config::kColumnGroups + seat.column_group;
  }
};

__device__ void project_qkv(const Parameters& p, const Instruction& item, int32_t loop, int32_t resident,
                            const Ring& ring, RingPlace& place, const Seat& seat) {
  constexpr int kColumns = Share<Config::kQkvColumns>::kColumns;
  const int column = Share<Config::kQkvColumns>::part(item, seat) * kColumns;
  const auto rows = RowScales::load(p, item, p.statistics1, seat);
  float sums[kColumns / 2];
  stream_product<kColumns>(sums, ring, place, seat, resident, rows, p.affine_of(item, 0));
  const int slot = qkv_slot(item.write_slot, loop, Config::kLayers);
  if (p.cosines && column < 2 * Config::kHidden) rotate<kColumns>(sums, p, item, seat);
  store_bf16<kColumns>(sums, p.qkv_values, 3 * Config::kHidden, column, p, item,
                       p.token(slot * p.batch + item.sequence, 0), seat);
}

__device__ void project_attn_out(const Parameters& p, const Instruction& item, int32_t loop, int32_t resident,
                                 const Ring& ring, RingPlace& place, const Seat& seat) {
  constexpr int kColumns = Share<Config::kAttnOutColumns>::kColumns;
  float sums[kColumns / 2];
  shared_product<kColumns>(sums, ring, place, seat, Config::kHidden / Config::kStep, resident);
  update_stream<kColumns>(sums, p, item, loop, seat, Share<Config::kAttnOutColumns>::part(item, seat),
                          nullptr, p.gate_of(item, 0), p.statistics2, nullptr);
}

__device__ void project_mlp_in(const Parameters& p, const Instruction& item, int32_t resident,
                               const Ring& ring, RingPlace& place, const Seat& seat) {
  constexpr int kColumns = Share<Config::kMlpInColumns>::kColumns;
  const int column = Share<Config::kMlpInColumns>::part(item, seat) * kColumns;
  const auto rows = RowScales::load(p, item, p.statistics2, seat);
  float sums[kColumns / 2];
  stream_product<kColumns>(sums, ring, place, seat, resident, rows, p.affine_of(item, 1));
  add_bias_gelu<kColumns>(sums, p.mlp_in_bias + item.layer * Config::kMlp + column, seat);
  store_bf16<kColumns>(sums, p.gelu_values, Config::kMlp, column, p, item, p.token(item.sequence, 0), seat);
}

__device__ void project_mlp_out(const Parameters& p, const Instruction& item, int32_t loop, int32_t resident,
                                const Ring& ring, RingPlace& place, const Seat& seat) {
  constexpr int kColumns = Share<Config::kMlpOutColumns>::kColumns;
  float sums[kColumns / 2];
  if (Config::kMlpOutParts > 1 && item.phase == kMlpSum) {
    add_parts<kColumns>(sums, p, item, seat);
  } else {
    shared_product<kColumns>(sums, ring, place, seat, Config::kMlp / Config::kMlpOutParts / Config::kStep,
                             resident);
    if (Config::kMlpOutParts > 1) return store_part<kColumns>(sums, p, item, seat);
  }
  const bool last = p.adaptive && item.layer == Config::kLayers - 1;
  update_stream<kColumns>(sums, p, item, loop, seat, Share<Config::kMlpOutColumns>::part(item, seat),
                          p.mlp_out_bias + item.layer * Config::kHidden, p.gate_of(item, 1), p.statistics1,
                          last ? p.change : nullptr);
}

__device__ void compute(const Parameters& p, const Ring& ring) {
  RingPlace place{0, 0}, read{0, 0};
  while (true) {
    const Issued issued = ring.take(read);
    const Seat seat;
    const Instruction& item = issued.item;
    switch (item.phase) {
      case kEnter:
        enter(p, item, issued.loop);
        break;
      case kQkv:
        project_qkv(p, item, issued.loop, issued.resident, ring, place, seat);
        break;
      case kAttention:
        attention(p, item, ring, place, seat);
        break;
      case kAttnOut:
        project_attn_out(p, item, issued.loop, issued.resident, ring, place, seat);
        break;
      case kMlpIn:
        project_mlp_in(p, item, issued.resident, ring, place, seat);
        break;
      case kMlpOut:
      case kMlpSum:
        project_mlp_out(p, item, issued.loop, issued.resident, ring, place, seat);
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
    ring.complete(read, [&](int32_t number) { return p.counter(number); });
  }
}

// Before the first instruction of any block, and behind the last one.
__device__ void begin(const Parameters& p, const Ring& ring) {
  if (threadIdx.x == 0) ring.initialise();
  if (kCounterBytes == 0) return __syncthreads();
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < p.number_of_counters(); i += kThreads) *p.counter(i) = p.counters[i];
  }
  meet_in_cluster();
}

__device__ inline void end() {
  if (kCounterBytes > 0) meet_in_cluster();  // the first block has the counters of all
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kThreads, 1)
    looped_blocks_sm90(const __grid_constant__ loopmdm::KernelParameters parameters) {
  using namespace loopmdm;
  const Ring ring(dynamic_shared_memory() + kCounterBytes);
  begin(parameters, ring);
  load_and_compute<kLoadRegisters>([&] { Loader(parameters, ring).run(); },
                                   [&] { compute(parameters, ring); });
  end();
}
