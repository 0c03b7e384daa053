// Copies from global to shared memory that a thread starts and waits for later. They go past L1: what another
// block has written lies in L2.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

// 16 bytes, or zeros.
__device__ inline void copy_16(uint32_t target, const void* source, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(there ? 16 : 0)
               : "memory");
}

__device__ inline void copy_16(uint32_t target, const void* source, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "l"(policy)
               : "memory");
}

// Ends a group of the thread's copies, which may be empty.
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the last `kPending` groups are under way.
template <int kPending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace loopmdm
