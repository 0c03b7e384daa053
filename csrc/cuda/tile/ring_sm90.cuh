// Shared memory of a block of `looped_blocks`: the ring of stages and one of instructions.
#pragma once

#include "cuda/ptx/warps.cuh"
#include "cuda/tile/config_sm90.cuh"
#include "cuda/tile/stage_ring_sm90.cuh"

namespace loopmdm {

// An instruction whose inputs are ready, with its loop.
struct alignas(16) Issued {
  Instruction item;
  int32_t loop;
  int32_t unused[2];
};
static_assert(sizeof(Issued) == 64, "four words of 16 bytes");

struct Ring : StageRing<Config::kStages, Config::kStageBytes, Config::kComputeThreads / 32, Config::kBlocks> {
  struct Queue {
    uint64_t issued[kInstructions], read[kInstructions];
    Issued instructions[kInstructions];
  };

  Queue* queue;

  __device__ explicit Ring(uint8_t* memory) : StageRing(memory), queue(reinterpret_cast<Queue*>(behind())) {}

  __device__ void initialise() const {
    for (int i = 0; i < kInstructions; ++i) {
      barrier_init(shared_address(&queue->issued[i]), 1);
      barrier_init(shared_address(&queue->read[i]), 1);
    }
    StageRing::initialise();
  }

  // By the warp that loads: an instruction whose inputs are ready.
  __device__ void issue(RingPlace& place, const Instruction& item, int32_t loop) const {
    wait_together(shared_address(&queue->read[place.slot]), place.round ^ 1);
    if (threadIdx.x % 32 == 0) {
      queue->instructions[place.slot].item = item;
      queue->instructions[place.slot].loop = loop;
      barrier_arrive(shared_address(&queue->issued[place.slot]));
    }
    __syncwarp();
    advance(place, kInstructions);
  }

  // By all threads that compute: the next instruction.
  __device__ Issued take(RingPlace place) const {
    barrier_wait(shared_address(&queue->issued[place.slot]), place.round);
    return queue->instructions[place.slot];
  }

  // By all threads that compute: the instruction is carried out, and its counter says so.
  __device__ void complete(RingPlace& place, int32_t* counters) const {
    const Instruction& item = queue->instructions[place.slot].item;
    proxy_fence();
    meet<1>(Config::kComputeThreads);
    if (threadIdx.x == 0) {
      if (item.signal >= 0) add_release(counters + item.signal, item.signal_count);
      barrier_arrive(shared_address(&queue->read[place.slot]));
    }
    advance(place, kInstructions);
  }
};
constexpr int kBarrierBytes = 2 * sizeof(uint64_t) * Config::kStages + sizeof(Ring::Queue);
static_assert(kBarrierBytes + 1024 <= 2048, "FIXED_BYTES of loopmdm_kernels/schedule/plan.py");

}  // namespace loopmdm
