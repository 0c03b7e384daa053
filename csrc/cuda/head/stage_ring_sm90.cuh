// A ring of stages in shared memory that one warp fills by TMA and `kReaders` warps empty. Of a pair of
// blocks that load for each other, a stage is empty when it is in both.
#pragma once

#include "common/schedule.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace loopmdm {

// Of a thread of the loading warp group and of the two that compute: what launch bounds give 384 threads.
constexpr int kLoaderRegisters = 24, kComputeRegisters = 240;
static_assert(kLoaderRegisters + 2 * kComputeRegisters <= 3 * 168, "registers are moved, not made");

// The same for all lanes of a warp, and known to be by the compiler.
__device__ inline int warp_group() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0); }

template <int kStages, int kStageBytes, int kReaders, bool kPaired = false>
class StageRing {
  static_assert(kStageBytes % 1024 == 0, "swizzle atoms");
  struct Barriers {
    uint64_t full[kStages], empty[kStages];
  };

 public:
  // With what it takes to begin at a swizzle atom, and 1 KB for barriers.
  static constexpr int kBytes = kStages * kStageBytes + 2048;

  __device__ explicit StageRing(uint8_t* memory) {
    const uint32_t address = shared_address(memory);
    const uint32_t skipped = (1024 - address % 1024) % 1024;
    stages_ = address + skipped;
    barriers_ = reinterpret_cast<Barriers*>(memory + skipped + kStages * kStageBytes);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(shared_address(&barriers_->full[i]), 1);
        barrier_init(shared_address(&barriers_->empty[i]), kPaired ? 2 * kReaders : kReaders);
      }
      barrier_init_fence();
    }
    if (kPaired) {
      meet_in_pair();
    } else {
      __syncthreads();
    }
  }

  // Every thread, at the end: a block that is gone can be neither loaded to nor told.
  __device__ static void leave() {
    if (kPaired) meet_in_pair();
  }

  __device__ uint32_t stage(RingPlace place) const { return stages_ + place.slot * kStageBytes; }
  __device__ uint32_t full(RingPlace place) const { return shared_address(&barriers_->full[place.slot]); }
  __device__ uint32_t empty(RingPlace place) const { return shared_address(&barriers_->empty[place.slot]); }

  __device__ void wait_full(RingPlace place) const { barrier_wait(full(place), place.round); }

  // By the warp that loads. What its leader then loads must not come back round before all lanes have seen
  // this round: a lane that missed it would wait for the same parity for good.
  __device__ void wait_empty(RingPlace place) const {
    barrier_wait(empty(place), place.round ^ 1);
    __syncwarp();
  }

  // The warp has read a stage.
  __device__ void release(RingPlace place) const {
    __syncwarp();
    if (kPaired) {
      if (threadIdx.x % 32 < 2) barrier_arrive_at(empty(place), threadIdx.x % 32);
    } else {
      if (threadIdx.x % 32 == 0) barrier_arrive(empty(place));
    }
  }

  __device__ static void next(RingPlace& place) { advance(place, kStages); }

 private:
  uint32_t stages_;
  Barriers* barriers_;
};

// The products of a warp group over `steps` stages: `multiply(stage, add)` issues those of one,
// `beside(stage)` does what else a stage is read for while they run.
template <class Ring, class Multiply, class Beside>
__device__ void multiply_stages(const Ring& ring, RingPlace& place, int steps, Multiply multiply,
                                Beside beside) {
  RingPlace before = place;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ring.wait_full(place);
    products_begin();
    multiply(ring.stage(place), step > 0);
    products_commit();
    beside(ring.stage(place));
    products_wait<1>();
    if (step > 0) ring.release(before);
    before = place;
    Ring::next(place);
  }
  products_wait<0>();
  ring.release(before);
}

}  // namespace loopmdm
