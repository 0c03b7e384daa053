// Emulated: see emulator.h.
#pragma once

#include "emulator.h"

namespace loopmdm {

template <int kRegisters>
void give_registers() {}

template <int kRegisters>
void take_registers() {}

template <int kBarrier>
void meet(int threads) {
  emulator::meet(emulator::self().block->named[kBarrier], threads, 0, nullptr, [](void**) {});
}

// The grid is one cluster.
inline void meet_in_cluster() {
  const int all = static_cast<int>(emulator::state->blocks.size()) * emulator::state->threads;
  emulator::meet(emulator::state->cluster, all, 0, nullptr, [](void**) {});
}

inline int32_t* in_first_block(int32_t* pointer) {
  const auto offset = reinterpret_cast<uint8_t*>(pointer) - emulator::self().block->shared;
  return reinterpret_cast<int32_t*>(emulator::state->blocks[0]->shared + offset);
}

}  // namespace loopmdm
