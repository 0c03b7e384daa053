// Emulated: see emulator.h.
#pragma once

#include "emulator.h"

namespace loopmdm {

template <int kRegisters>
void give_registers() {
  emulator::executed_together("setmaxnreg");
}

template <int kRegisters>
void take_registers() {
  emulator::executed_together("setmaxnreg");
}

template <int kBarrier>
void meet(int threads) {
  emulator::meet_at(kBarrier, threads);
}

template <int kThreads>
void meet_at(int barrier) {
  emulator::meet_at(barrier, kThreads);
}

template <int kThreads>
void arrive_at(int barrier) {
  emulator::arrive_at(barrier, kThreads);
}

inline bool elected() {
  emulator::executed_together("elect");
  return threadIdx.x % 32 == 0;
}

}  // namespace loopmdm
