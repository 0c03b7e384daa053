// Emulated: see emulator.h.
#pragma once

#include "cuda/ptx/memory.cuh"

namespace loopmdm {

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  emulator::Barrier fresh;
  fresh.expected = fresh.arrivals = arrivals;
  emulator::self().block->barriers[barrier] = fresh;
}

inline void barrier_init_fence() {}

inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulator::Barrier& reached = emulator::barrier(barrier);
  reached.bytes += bytes;
  --reached.arrivals;
  reached.settle();
}

inline void barrier_arrive(uint32_t barrier) { barrier_arrive_expect(barrier, 0); }

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  const emulator::Barrier* const waited = &emulator::barrier(barrier);
  emulator::wait_until([=] { return (waited->round & 1) != parity; });
}

}  // namespace loopmdm
