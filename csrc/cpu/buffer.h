// Scratch memory of the kernels: 64-byte aligned, not initialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

namespace loopmdm::cpu {

constexpr std::align_val_t kBufferAlign{64};

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, kBufferAlign); }
};

template <class T>
using AlignedBuffer = std::unique_ptr<T[], AlignedDelete>;

template <class T>
AlignedBuffer<T> aligned_buffer(int64_t count) {
  static_assert(std::is_trivially_destructible_v<T>);
  void* memory = ::operator new(static_cast<size_t>(count) * sizeof(T), kBufferAlign);
  return AlignedBuffer<T>(static_cast<T*>(memory));
}

}  // namespace loopmdm::cpu
