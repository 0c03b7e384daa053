// Emulated: see emulator.h. A copy is made when it is started or when it is waited for, at random.
#pragma once

#include "common/host_device.h"
#include "emulator.h"

namespace loopmdm {

inline void copy_16(uint32_t target, const void* source, bool there) {
  if (there && !emulator::ordered_load(source, 16)) emulator::fail("a copy of what another thread stores");
  uint8_t* const place = emulator::shared_byte(target);
  const auto copy = [=] {
    if (there) {
      memcpy(place, source, 16);
    } else {
      memset(place, 0, 16);
    }
  };
  if (emulator::state->random() % 2) {
    copy();
  } else {
    emulator::self().copies.back().push_back(copy);
  }
}

inline void copy_16(uint32_t target, const void* source, uint64_t) { copy_16(target, source, true); }

inline void copies_commit() { emulator::self().copies.emplace_back(); }

template <int kPending>
void copies_wait() {
  auto& groups = emulator::self().copies;  // and the open one
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const auto& copy : groups.front()) copy();
  }
}

}  // namespace loopmdm
