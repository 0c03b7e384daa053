// What must be ordered before what: stores before loads of the same, reads of shared memory before copies
// that overwrite it, and stores of threads, by a proxy fence, before bulk copies and products of what they
// stored.
#pragma once

#include "fibers.h"

namespace emulator {

// Global memory. Only stores through cuda/ptx/memory.cuh are seen.

inline Page* page_of(const void* address, bool make) {
  const uintptr_t number = reinterpret_cast<uintptr_t>(address) / 4096;
  if (state->last_number == number && (state->last_page || !make)) return state->last_page;
  const auto found = state->pages.find(number);
  state->last_number = number;
  state->last_page = found != state->pages.end() ? &found->second : make ? &state->pages[number] : nullptr;
  return state->last_page;
}

// Calls `look` for the tag of each four bytes that may have one, until it returns false.
template <class Look>
bool all_tags(const void* address, size_t bytes, bool make, Look look) {
  const uint8_t *const first = static_cast<const uint8_t*>(address), *const last = first + bytes;
  for (const uint8_t* at = first; at < last;) {
    const uintptr_t inside = reinterpret_cast<uintptr_t>(at) % 4096;
    const uint8_t* const end = std::min(last, at + (4096 - inside));
    Page* const page = page_of(at, make);
    for (uintptr_t i = inside / 4; page && i <= (inside + (end - at) - 1) / 4; ++i) {
      if (!look(page->tags[i])) return false;
    }
    at = end;
  }
  return true;
}

inline int clock_of(int thread) {
  const Fiber& fiber = *state->fibers[thread];
  return fiber.clock;
}

// Whether a store is ordered before what the thread does now.
inline bool known(const Tag& tag) {
  const Fiber& fiber = self();
  return tag.thread < 0 || tag.thread == fiber.number || tag.time <= fiber.known.times[clock_of(tag.thread)];
}

inline Barrier& barrier(uint32_t address) {
  const auto found = self().block->barriers.find(address);
  if (found == self().block->barriers.end() || !known(found->second.initialised)) {
    fail("a barrier is used before its initialisation is known");
  }
  return found->second;
}

inline void stored(const void* address, size_t bytes) {
  const Fiber& fiber = self();
  const Tag own{fiber.number, state->now[fiber.clock]};
  const bool ordered = all_tags(address, bytes, true, [&](Tag& tag) {
    if (!known(tag)) return false;
    tag = own;
    return true;
  });
  if (!ordered) fail("two threads store to one place, in no order");
}

inline void stored_atomically(const void* address, size_t bytes) {
  const Tag own{self().number, state->now[self().clock]};
  all_tags(address, bytes, true, [own](Tag& tag) {
    tag = own;
    return true;
  });
}

inline bool ordered_load(const void* address, size_t bytes) { return all_tags(address, bytes, false, known); }

// What is not known to have been stored is read as NaN: whoever does not use it may read it.
template <class T>
T load(const T* address) {
  T value;
  if (ordered_load(address, sizeof(T))) {
    value = *address;
  } else {
    memset(&value, 0xFF, sizeof(T));
  }
  return value;
}

inline void load_constant(const void* address, size_t bytes) {
  const bool constant = all_tags(address, bytes, false, [](const Tag& tag) { return tag.thread < 0; });
  if (!constant) fail("a load by way of L1 of what the kernel stores");
}

// Orders the thread's stores, and those that it knows of, before bulk copies.
inline void fence_proxy() {
  Fiber& fiber = self();
  fiber.known.times[fiber.clock] = state->now[fiber.clock]++;
  for (size_t i = 0; i < fiber.known.times.size(); ++i) {
    fiber.known.proxied[i] = std::max(fiber.known.proxied[i], fiber.known.times[i]);
  }
}

// Shared memory.

inline uint32_t line_of(uint32_t address) { return (address - kSharedBase) / kLineBytes; }

// What lies in a line was copied there, and the thread has waited for it.
inline bool arrived(const Block& block, uint32_t line, uint32_t known) {
  return block.lines.written[line] <= known;
}

inline void read_shared(uint32_t address) {
  const Fiber& fiber = self();
  Block& block = *fiber.block;
  shared_byte(address);
  const uint32_t line = line_of(address);
  if (!arrived(block, line, fiber.known.times[block.first_clock + kCopies]))
    fail("shared memory is read without a wait for the copy to it");
  block.lines.read[fiber.thread / 32][line] = state->now[fiber.clock];
}

// A store to shared memory is ordered as a read is, and before the loads of other threads.
template <class T>
void store_shared(uint32_t address, T value) {
  read_shared(address);
  uint8_t* const place = shared_byte(address);
  stored(place, sizeof(T));
  memcpy(place, &value, sizeof(T));
  self().stored.push_back({address - kSharedBase, sizeof(T)});
}

// Products see what the thread has stored to shared memory.
inline void fence_shared_proxy() {
  fence_proxy();
  Block& block = *self().block;
  for (const auto& [place, bytes] : self().stored) memcpy(&block.copied[place], block.shared + place, bytes);
  self().stored.clear();
}

// A copy is on its way to these lines.
inline void begin_copy(Block& block, uint32_t address, uint32_t bytes) {
  const Known& known = self().known;
  const auto fenced = [&](const Tag& tag) {
    return tag.thread < 0 || tag.time <= known.proxied[clock_of(tag.thread)];
  };
  if (!all_tags(block.shared + (address - kSharedBase), bytes, false, fenced))
    fail("a copy over what a thread has stored, without proxy fence");
  for (uint32_t line = line_of(address); line < line_of(address + bytes); ++line) {
    if (block.lines.written[line] == kUnderWay) fail("two copies to one place");
    for (int warp = 0; warp < kWarps; ++warp) {
      uint32_t time = block.lines.read[warp][line];
      if (time & kUnderWay) {
        const auto& waited = block.products[warp].waited;
        const uint32_t product = time - kUnderWay;
        if (product >= waited.size()) fail("a copy to what a product reads");
        time = waited[product];
      }
      if (time > known.times[block.first_clock + warp]) fail("a copy to what may still be read");
    }
    block.lines.written[line] = kUnderWay;
  }
}

inline void end_copy(Block& block, uint32_t address, uint32_t bytes) {
  const uint32_t first = address - kSharedBase;
  memcpy(&block.copied[first], block.shared + first, bytes);
  const uint32_t now = ++state->now[block.first_clock + kCopies];
  for (uint32_t line = line_of(address); line < line_of(address + bytes); ++line)
    block.lines.written[line] = now;
}

// The warp's product number `product` reads these lines. Copies up to time `known` are known to all lanes.
inline void product_reads(Block& block, int warp, uint32_t product, uint32_t address, uint32_t bytes,
                          uint32_t known) {
  shared_byte(address + bytes - 1);
  for (uint32_t line = line_of(address); line <= line_of(address + bytes - 1); ++line) {
    if (!arrived(block, line, known)) fail("a product reads what has not been waited for");
    block.lines.read[warp][line] = kUnderWay | product;
  }
}

}  // namespace emulator
