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

}  // namespace loopmdm
