// Loads of boxes of a tensor by TMA. All tensors here have three dimensions: column, row, matrix.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

// CUtensorMap of cuda.h, which device code treats as opaque.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

__device__ inline void load_box(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                                int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5}], "
      "[%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(matrix)
      : "memory");
}

__device__ inline void load_box(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                                int matrix, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(matrix), "l"(policy)
      : "memory");
}

}  // namespace loopmdm
