// The warp that streams weights through the ring: those of all layers, as often as there are loops.
#pragma once

#include "cuda/looped_blocks/rows_config_sm90.cuh"

namespace loopmdm {

namespace looped_rows {

class WeightStream {
 public:
  __device__ WeightStream(const KernelParameters& p, const Memory& memory)
      : p_(p), memory_(memory), keep_(keep_policy()) {}

  __device__ void run() {
    uint32_t decisions = 0;
    for_each_sequence(p_, [&](int sequence) {
      const int32_t loops = __ldcg(p_.stop + sequence);
#pragma unroll 1
      for (int32_t loop = 0; loop < loops; ++loop) {
#pragma unroll 1
        for (int layer = 0; layer < Widths::kLayers; ++layer) load_layer(layer);
        if (!p_.adaptive || loop + 1 == loops) continue;
        Ring::wait_together(memory_.decided(), decisions & 1);
        ++decisions;
        if (!load_shared(memory_.goes_on())) break;
      }
    });
  }

 private:
  // In the order in which they are multiplied: keys and values, which others wait for, before queries.
  __device__ void load_layer(int layer) {
    load(&p_.qkv_weight, kHidden, 3 * kHidden, kHidden, layer);
    load(&p_.qkv_weight, 0, kHidden, kHidden, layer);
    load(&p_.attn_out_weight, 0, kHidden, kHidden, layer);
    load(&p_.mlp_in_weight, 0, kMlp, kHidden, layer);
    load(&p_.mlp_out_weight, 0, kHidden, kMlp, layer);
  }

  __device__ void load(const TensorMap* weights, int first, int last, int inner, int layer) {
#pragma unroll 1
    for (int feature = first; feature < last; feature += kFeatures) {
#pragma unroll 1
      for (int column = 0; column < inner; column += kStep) {
        memory_.ring.wait_empty(place_);
        if (elected()) {
          const uint32_t full = memory_.ring.full(place_);
          barrier_arrive_expect(full, kStageBytes);
          load_box(memory_.ring.stage(place_), weights, full, column, feature, layer, keep_);
        }
        Ring::next(place_);
      }
    }
  }

  const KernelParameters& p_;
  const Memory& memory_;
  const uint64_t keep_;
  RingPlace place_{0, 0};
};

}  // namespace looped_rows

}  // namespace loopmdm
