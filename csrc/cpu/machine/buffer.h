// Scratch memory of the kernels: 64-byte aligned, not initialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__linux__)
#  include <sys/mman.h>
#endif

namespace loopmdm::cpu {

// Memory of at least `bytes`, on a cache line; the thread's own of an earlier call where some is left, since
// fresh pages cost more than many a small call. Sets `bytes` to what there is.
void* take_memory(int64_t& bytes);
void give_memory(void* memory, int64_t bytes);

struct AlignedDelete {
  int64_t bytes = 0;
  void operator()(void* p) const { give_memory(p, bytes); }
};

template <class T>
using AlignedBuffer = std::unique_ptr<T[], AlignedDelete>;

// Asks for large pages where that pays: fewer faults on the first touch (of fresh
// memory one each 4 KB, up to a fifth of the time that writing logits takes), fewer misses of the address
// cache. `discard`: the contents are of no use. Memory that was in use before has small pages, which advice
// leaves as they are; they are given back, and large ones come in their place.
inline void prefer_large_pages(void* memory, int64_t bytes, bool discard = false) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t last =
      (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first >= last) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  if (discard) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#else
  (void)memory, (void)bytes, (void)discard;
#endif
}

template <class T>
AlignedBuffer<T> aligned_buffer(int64_t count) {
  static_assert(std::is_trivially_destructible_v<T>);
  int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  void* memory = take_memory(bytes);
  return AlignedBuffer<T>(static_cast<T*>(memory), AlignedDelete{bytes});
}

template <class T>
AlignedBuffer<T> zeroed(int64_t count) {
  auto buffer = aligned_buffer<T>(count);
  std::memset(buffer.get(), 0, static_cast<size_t>(count) * sizeof(T));
  return buffer;
}

#include "cpu/machine/layout.h"

}  // namespace loopmdm::cpu
