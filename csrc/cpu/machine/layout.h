// Lays arrays out one after the other in one piece of memory. Kernels include it in their own namespace: no
// template may be shared between instruction sets.
#pragma once

class Layout {
 public:
  explicit Layout(void* base) : base_(static_cast<char*>(base)) {}  // null: to learn the size

  // On a cache line of its own.
  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};
