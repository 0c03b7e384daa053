// What a tile of the backward pass keeps in shared memory beside the ring: two left operands of attention,
// 128 rows by a head each, and numbers of rows.
#pragma once

#include "cuda/looped_blocks/backward_config_sm90.cuh"
#include "cuda/tile/ring_sm90.cuh"

namespace loopmdm {

namespace backward {

struct Kept {
  static constexpr uint32_t kOperandBytes = 2 * kHeadPanels * kPanelBytes;

  struct Barriers {
    uint64_t full, empty;
    float4 rows[kPart];  // mean, inverse deviation and the two means of a gradient that a norm takes away
  };

  uint32_t operands;
  Barriers* barriers;

  __device__ explicit Kept(const Ring& ring) {
    barriers = reinterpret_cast<Barriers*>(ring.queue + 1);
    operands = ring.beside() + 1024;
  }

  __device__ void initialise() const {
    barrier_init(full(), 1);
    barrier_init(empty(), kWarps);
  }

  __device__ uint32_t full() const { return shared_address(&barriers->full); }
  __device__ uint32_t empty() const { return shared_address(&barriers->empty); }
  __device__ uint32_t panel(int operand, int panel, int half) const {
    return operands + operand * kOperandBytes + (2 * panel + half) * kPanelBytes;
  }
  __device__ void release() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty());
  }
};
static_assert(kBarrierBytes % 16 == 0 && kBarrierBytes + sizeof(Kept::Barriers) <= 1024,
              "between the ring's stages and the operands");

}  // namespace backward

}  // namespace loopmdm
