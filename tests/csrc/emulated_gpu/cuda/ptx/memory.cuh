// Emulated: see emulator.h. What a thread stores is in memory at once; order.h knows who may rely on it.
#pragma once

#include "common/host_device.h"
#include "emulator.h"

namespace loopmdm {

inline uint32_t shared_address(const void* pointer) {
  return emulator::kSharedBase + (static_cast<const uint8_t*>(pointer) - emulator::self().block->shared);
}

// Not a multiple of an atom, so that the kernel must find one.
inline uint8_t* dynamic_shared_memory() { return emulator::self().block->shared; }

inline uint32_t load_shared(uint32_t address) {
  emulator::read_shared(address);
  return emulator::load(reinterpret_cast<const uint32_t*>(emulator::shared_byte(address)));
}

inline float2 load_shared_pair(uint32_t address) {
  emulator::read_shared(address);
  return emulator::load(reinterpret_cast<const float2*>(emulator::shared_byte(address)));
}

inline void store_shared(uint32_t address, uint32_t value) { emulator::store_shared(address, value); }
inline void store_shared_float(uint32_t address, float value) { emulator::store_shared(address, value); }
inline void store_shared_four(uint32_t address, uint4 value) { emulator::store_shared(address, value); }
inline void store_shared_pair(uint32_t address, float2 pair) { emulator::store_shared(address, pair); }

inline int32_t load_acquire(const int32_t* address) {
  const auto signal = emulator::state->signals.find(address);
  if (signal != emulator::state->signals.end()) emulator::self().known.learn(signal->second);
  if (!emulator::ordered_load(address, 4)) emulator::fail("a number is read that another thread stores");
  return *address;
}

inline void store_release(int32_t* address, int32_t value) {
  emulator::state->signals[address] = emulator::told();
  *address = value;
}

inline void add_release(int32_t* address, int32_t value) {
  emulator::state->signals[address].learn(emulator::told());
  *address += value;
}

// Of numbers that are read when a signal has said that they are there.
inline void raise_to(int32_t* address, int32_t value) {
  emulator::stored_atomically(address, sizeof *address);
  *address = std::max(*address, value);
}

inline void wait_for(const int32_t* counter, int32_t target) {
  emulator::wait_until([=] { return *counter >= target; });
  load_acquire(counter);
}

inline void shared_proxy_fence() { emulator::fence_shared_proxy(); }
inline void proxy_fence() { emulator::fence_proxy(); }
inline uint64_t keep_policy() { return 0; }

inline float2 load_pair(const float* address) { return __ldcg(reinterpret_cast<const float2*>(address)); }

inline float2 load_constant_pair(const float* address) {
  return __ldg(reinterpret_cast<const float2*>(address));
}

template <class T>
void store(T* address, T value) {
  emulator::stored(address, sizeof(T));
  *address = value;
}

inline void store_pair(float* address, float2 value) { store(reinterpret_cast<float2*>(address), value); }

}  // namespace loopmdm
