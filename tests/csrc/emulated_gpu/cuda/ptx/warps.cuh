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

// The grid is one cluster.
inline void meet_in_cluster() {
  const int all = static_cast<int>(emulator::state->blocks.size()) * emulator::state->threads;
  emulator::meet_and_tell(emulator::state->cluster, all);
}

inline int32_t* in_first_block(int32_t* pointer) {
  emulator::reach_into(*emulator::state->blocks[0]);
  const auto offset = reinterpret_cast<uint8_t*>(pointer) - emulator::self().block->shared;
  return reinterpret_cast<int32_t*>(emulator::state->blocks[0]->shared + offset);
}

}  // namespace loopmdm
