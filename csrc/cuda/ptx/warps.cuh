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

// The same at one that is known only when the kernel runs, and arriving there without waiting for the others.
template <int kThreads>
__device__ inline void meet_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ inline void arrive_at(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Of a whole warp one lane, always the same. The compiler knows that it is one: a load by TMA needs no loop
// over lanes then.
__device__ inline bool elected() {
  uint32_t one;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, %1;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(one)
      : "r"(~0u));
  return one != 0;
}

}  // namespace loopmdm
