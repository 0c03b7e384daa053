// A ring of stages in shared memory that one warp fills by TMA and `kReaders` warps empty, and the division
// of a block that goes with it. Where blocks load for each other, a stage is empty when it is in all of them.
// Of four each loads for two neighbours only, but hears of all: a count does not say whose arrivals it has,
// and with three of them a block that is early twice could stand in for one that is late.
#pragma once

#include "common/schedule.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/warps.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace loopmdm {

// The same for all lanes of a warp, and known to be by the compiler.
__device__ inline int warp_group() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0); }

// Of three warp groups two compute, and of the last one a warp loads. Registers are moved from it to the
// others: launch bounds give 168 to each of 384 threads.
template <int kLoadRegisters, class Load, class Compute>
__device__ void load_and_compute(const Load& load, const Compute& compute) {
  constexpr int kComputeThreads = 256, kComputeRegisters = (3 * 168 - kLoadRegisters) / 2;
  if (threadIdx.x >= kComputeThreads) {
    give_registers<kLoadRegisters>();
    if (threadIdx.x < kComputeThreads + 32) load();
  } else {
    take_registers<kComputeRegisters>();
    compute();
  }
}

// `kBlocks` load for each other: 1, 2 or 4. `kBesideBytes`: of memory that lies between the stages and the
// barriers.
template <int kStages, int kStageBytes, int kReaders, int kBlocks = 1, int kBesideBytes = 0>
class StageRing {
  static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4, "blocks of a cluster");
  static_assert(kStageBytes % 1024 == 0 && kBesideBytes % 1024 == 0, "swizzle atoms");
  struct Barriers {
    uint64_t full[kStages], empty[kStages];
  };

 public:
  // With what it takes to begin at a swizzle atom, and 1 KB for barriers.
  static constexpr int kBytes = kStages * kStageBytes + kBesideBytes + 2048;

  // `memory` is dynamic shared memory; stages begin at the next multiple of a swizzle atom.
  __device__ explicit StageRing(uint8_t* memory) {
    const uint32_t address = shared_address(memory);
    const uint32_t skipped = (1024 - address % 1024) % 1024;
    stages_ = address + skipped;
    barriers_ = reinterpret_cast<Barriers*>(memory + skipped + kStages * kStageBytes + kBesideBytes);
  }

  // By one thread, before the others go on.
  __device__ void initialise() const {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&barriers_->full[i]), 1);
      barrier_init(shared_address(&barriers_->empty[i]), kBlocks * kReaders);
    }
    barrier_init_fence();
  }

  // By every thread of a block, and of those that it loads for: a block that is gone can be neither loaded to
  // nor told.
  __device__ static void meet_all() {
    if (kBlocks > 1) {
      meet_in_cluster();
    } else {
      __syncthreads();
    }
  }

  __device__ uint32_t stage(RingPlace place) const { return stages_ + place.slot * kStageBytes; }
  __device__ uint32_t full(RingPlace place) const { return shared_address(&barriers_->full[place.slot]); }
  __device__ uint32_t empty(RingPlace place) const { return shared_address(&barriers_->empty[place.slot]); }
  __device__ uint32_t beside() const { return stages_ + kStages * kStageBytes; }
  __device__ uint8_t* behind() const { return reinterpret_cast<uint8_t*>(barriers_ + 1); }

  __device__ void wait_full(RingPlace place) const { barrier_wait(full(place), place.round); }
  __device__ void wait_empty(RingPlace place) const { wait_together(empty(place), place.round ^ 1); }

  // By the warp that loads. What its leader then sends round the ring must not come back before all lanes
  // have seen this round: a lane that missed it would wait for the same parity for good.
  __device__ static void wait_together(uint32_t barrier, uint32_t parity) {
    barrier_wait(barrier, parity);
    __syncwarp();
  }

  // The warp has read a stage.
  __device__ void release(RingPlace place) const {
    __syncwarp();
    if (kBlocks > 1) {
      const int lane = threadIdx.x % 32;
      if (lane < kBlocks) barrier_arrive_at(empty(place), lane);
    } else {
      if (threadIdx.x % 32 == 0) barrier_arrive(empty(place));
    }
  }

  __device__ static void next(RingPlace& place) { advance(place, kStages); }

 private:
  uint32_t stages_;
  Barriers* barriers_;
};

// The products of a warp group over `steps` stages: `multiply(place, step)` issues those of one,
// `beside(place)` does what else a stage is read for while they run.
template <int kSums, class Ring, class Multiply, class Beside>
__device__ void multiply_stages(float (&sums)[kSums], const Ring& ring, RingPlace& place, int steps,
                                Multiply multiply, Beside beside) {
  RingPlace before = place;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ring.wait_full(place);
    products_begin(sums);
    multiply(place, step);
    products_commit();
    beside(place);
    products_wait<1>();
    if (step > 0) ring.release(before);
    before = place;
    Ring::next(place);
  }
  products_wait<0>();
  pin(sums);
  ring.release(before);
}

}  // namespace loopmdm
