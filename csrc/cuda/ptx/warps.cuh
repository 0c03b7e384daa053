// Registers and meetings of groups of warps.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Meeting of `threads` threads at one of the hardware's barriers; 0 is __syncthreads.
template <int kBarrier>
__device__ inline void meet(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

}  // namespace loopmdm
