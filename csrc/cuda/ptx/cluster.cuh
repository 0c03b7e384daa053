// Blocks that share what they load: those of one cluster, whose shared memory has the same layout.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/warps.cuh"

namespace loopmdm {

__device__ inline int rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Meeting of all threads of a cluster; warps need not be together.
__device__ inline void meet_in_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// At the barrier that lies there in the shared memory of block `rank`.
__device__ inline void barrier_arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// A box for the blocks whose bits are set: to the same place in each, announced at the barrier of each.
__device__ inline void load_box_for_all(uint32_t target, const TensorMap* map, uint32_t barrier, int column,
                                        int row, int matrix, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(matrix), "h"(blocks)
      : "memory");
}

__device__ inline void load_box_for_all(uint32_t target, const TensorMap* map, uint32_t barrier, int column,
                                        int row, int matrix, uint16_t blocks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(matrix), "h"(blocks), "l"(policy)
      : "memory");
}

}  // namespace loopmdm
