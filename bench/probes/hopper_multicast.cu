// Whether blocks in a cluster that load the same, each a part of it for all, get it faster than alone.
#include "common/schedule.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

using namespace loopmdm;

namespace {

constexpr int kRing = 8;
constexpr uint32_t kRows = 128, kStageBytes = 128 * kRows;

struct SharedReads {
  TensorMap map;  // of rows of 128 bytes, in boxes of kRows by the size of the cluster
  int32_t stages, rounds;
};

__device__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ void meet_in_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// At the same barrier of another block of the cluster.
__device__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// To the same place of every block in `mask`, and to its barrier there.
__device__ void load_box_for_all(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                                 uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(0), "h"(mask)
      : "memory");
}

}  // namespace

// Every cluster reads all of the buffer, `rounds` times, each from another place on.
extern "C" __global__ void __launch_bounds__(64, 1) read_together(const __grid_constant__ SharedReads given) {
  __shared__ uint64_t full[kRing], empty[kRing];
  const uint32_t rank = cluster_rank(), size = cluster_size();
  const uint32_t memory = (shared_address(dynamic_shared_memory()) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRing; ++i) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&empty[i]), size);
    }
    barrier_init_fence();
  }
  meet_in_cluster();
  RingPlace place{0, 0};
  const int number = given.stages * given.rounds;
  if (threadIdx.x == 0) {
    int stage = blockIdx.x / size * (given.stages / (gridDim.x / size));
    for (int i = 0; i < number; ++i) {
      // A slot is free when every block of the cluster has read it: all of them are written.
      barrier_wait(shared_address(&empty[place.slot]), place.round ^ 1);
      const uint32_t barrier = shared_address(&full[place.slot]), part = kRows / size;
      barrier_arrive_expect(barrier, kStageBytes);
      const uint32_t target = memory + place.slot * kStageBytes + rank * 128 * part;
      const int row = stage * kRows + rank * part;
      if (size == 1) {
        load_box(target, &given.map, barrier, 0, row, 0);
      } else {
        load_box_for_all(target, &given.map, barrier, 0, row, static_cast<uint16_t>((1 << size) - 1));
      }
      stage = stage + 1 == given.stages ? 0 : stage + 1;
      advance(place, kRing);
    }
  } else if (threadIdx.x == 32) {
    for (int i = 0; i < number; ++i) {
      barrier_wait(shared_address(&full[place.slot]), place.round);
      for (uint32_t other = 0; other < size; ++other) {
        barrier_arrive_at(shared_address(&empty[place.slot]), other);
      }
      advance(place, kRing);
    }
  }
  meet_in_cluster();  // nobody may be gone while others write to it
}
