// Shared memory of a block: a ring of stages that TMA fills and warp groups empty, one of instructions, and
// weights that stay for all loops.
#pragma once

#include "common/schedule.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/warps.cuh"
#include "cuda/tile/config_sm90.cuh"

namespace loopmdm {

// An instruction whose inputs are ready, with its loop.
struct alignas(16) Issued {
  Instruction item;
  int32_t loop;
  int32_t resident;  // bytes from the beginning of what stays: the tile's weights; -1: they are in the stages
  int32_t unused;
};
static_assert(sizeof(Issued) == 64, "four words of 16 bytes");

struct Ring {
  struct Barriers {
    uint64_t full[Config::kStages], empty[Config::kStages];
    uint64_t issued[kInstructions], read[kInstructions];
    Issued instructions[kInstructions];
  };

  uint32_t stages, resident;
  Barriers* barriers;

  // `memory` is dynamic shared memory; stages begin at the next multiple of a swizzle atom.
  __device__ explicit Ring(uint8_t* memory) {
    const uint32_t address = shared_address(memory);
    const uint32_t skipped = (1024 - address % 1024) % 1024;
    stages = address + skipped;
    resident = stages + Config::kStages * Config::kStageBytes;
    barriers = reinterpret_cast<Barriers*>(memory + (resident - address) + Config::kResidentBytes);
  }

  __device__ void initialise() const {
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), Config::kComputeThreads / 32);
    }
    for (int i = 0; i < kInstructions; ++i) {
      barrier_init(issued(i), 1);
      barrier_init(read(i), 1);
    }
    barrier_init_fence();
  }

  __device__ uint32_t stage(uint32_t slot) const { return stages + slot * Config::kStageBytes; }
  __device__ uint32_t full(uint32_t slot) const { return shared_address(&barriers->full[slot]); }
  __device__ uint32_t empty(uint32_t slot) const { return shared_address(&barriers->empty[slot]); }
  __device__ uint32_t issued(uint32_t slot) const { return shared_address(&barriers->issued[slot]); }
  __device__ uint32_t read(uint32_t slot) const { return shared_address(&barriers->read[slot]); }

  __device__ void wait_full(RingPlace place) const { barrier_wait(full(place.slot), place.round); }
  __device__ void wait_empty(RingPlace place) const { wait_together(empty(place.slot), place.round ^ 1); }

  // By the warp that loads. What its leader then sends round the ring must not come back before all lanes
  // have seen this round: a lane that missed it would wait for the same parity for good.
  __device__ static void wait_together(uint32_t barrier, uint32_t parity) {
    barrier_wait(barrier, parity);
    __syncwarp();
  }

  // By the warp that loads: an instruction whose inputs are ready.
  __device__ void issue(RingPlace& place, const Instruction& item, int32_t loop,
                        int32_t resident = -1) const {
    wait_together(read(place.slot), place.round ^ 1);
    if (threadIdx.x % 32 == 0) {
      barriers->instructions[place.slot].item = item;
      barriers->instructions[place.slot].loop = loop;
      barriers->instructions[place.slot].resident = resident;
      barrier_arrive(issued(place.slot));
    }
    __syncwarp();
    advance(place, kInstructions);
  }

  // By all threads that compute: the instruction is carried out, and its counter, which `counter` finds by
  // its number, says so.
  template <class Counter>
  __device__ void complete(RingPlace& place, Counter counter) const {
    const Instruction& item = barriers->instructions[place.slot].item;
    proxy_fence();
    meet<1>(Config::kComputeThreads);
    if (threadIdx.x == 0) {
      if (item.signal >= 0) add_release(counter(item.signal), item.signal_count);
      barrier_arrive(read(place.slot));
    }
    advance(place, kInstructions);
  }

  // The right operand of a stage of a product: `left_bytes` into it, or among the weights that stay.
  __device__ uint32_t right(uint32_t slot, uint32_t left_bytes, int32_t place, int step,
                            uint32_t bytes) const {
    if (Config::kResidentBytes > 0 && place >= 0) return resident + place + step * bytes;
    return stage(slot) + left_bytes;
  }

  // The warp has read a stage.
  __device__ void release(RingPlace place) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty(place.slot));
  }
};
static_assert(sizeof(Ring::Barriers) + 1024 <= 2048, "FIXED_BYTES of loopmdm_kernels/schedule/cost.py");

}  // namespace loopmdm
