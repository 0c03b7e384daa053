// Emulated: see emulator.h.
#pragma once

#include "cuda/ptx/memory.cuh"

namespace loopmdm {

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  if (barrier % 8 != 0) emulator::fail("a barrier that is not aligned");
  emulator::Fiber& fiber = emulator::self();
  emulator::Barrier fresh;
  fresh.expected = fresh.arrivals = arrivals;
  fresh.arriving = fresh.told = emulator::Known(emulator::state->now.size());
  fresh.first_clock = fiber.block->first_clock;
  fresh.initialised = {fiber.number, emulator::state->now[fiber.clock]};
  fiber.block->barriers[barrier] = fresh;
}

inline void barrier_init_fence() {
  emulator::Fiber& fiber = emulator::self();
  for (auto& barrier : fiber.block->barriers) {
    if (barrier.second.initialised.thread == fiber.number) barrier.second.fenced = true;
  }
}

// For who is not an ordinary access of this block: copies, and threads of the other block of a pair.
inline void require_fence(uint32_t barrier) {
  if (!emulator::barrier(barrier).fenced) emulator::fail("no fence behind the initialisation of a barrier");
}

inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulator::Barrier& reached = emulator::barrier(barrier);
  reached.bytes += bytes;
  reached.arriving.learn(emulator::told());
  if (--reached.arrivals < 0) emulator::fail("more threads arrive at a barrier than it expects");
  reached.settle();
}

inline void barrier_arrive(uint32_t barrier) { barrier_arrive_expect(barrier, 0); }

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::Barrier* const waited = &emulator::barrier(barrier);
  emulator::wait_until([=] { return (waited->round & 1) != parity; });
  emulator::Fiber& fiber = emulator::self();
  waited->seen[fiber.thread / 32] = emulator::state->now[fiber.clock];
  fiber.known.learn(waited->told);
}

}  // namespace loopmdm
