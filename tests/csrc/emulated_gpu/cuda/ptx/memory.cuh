// Emulated: see emulator.h. What a block writes is seen by all at once.
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
  uint32_t value;
  memcpy(&value, emulator::shared_byte(address), 4);
  return value;
}

inline float2 load_shared_pair(uint32_t address) {
  float2 pair;
  memcpy(&pair, emulator::shared_byte(address), 8);
  return pair;
}

inline int32_t load_acquire(const int32_t* address) { return *address; }
inline void store_release(int32_t* address, int32_t value) { *address = value; }
inline void add_release(int32_t* address, int32_t value) { *address += value; }
inline void raise_to(int32_t* address, int32_t value) { *address = std::max(*address, value); }

inline void wait_for(const int32_t* counter, int32_t target) {
  emulator::wait_until([=] { return *counter >= target; });
}

inline void proxy_fence() {}
inline uint64_t keep_policy() { return 0; }

inline float2 load_pair(const float* address) { return {address[0], address[1]}; }
inline float2 load_constant_pair(const float* address) { return {address[0], address[1]}; }
inline void store_pair(float* address, float2 value) {
  address[0] = value.x;
  address[1] = value.y;
}

}  // namespace loopmdm
