// Counter-based random numbers: a stream is named by (seed, index), so puzzle i of a seed never
// depends on the batch it was asked for in, nor on the thread that made it.
#pragma once

#include <cstdint>
#include <utility>

namespace loopmdm::sudoku {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words.
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

class Random {
 public:
  Random(uint64_t seed, uint64_t index) : state_(mix(mix(seed + kGolden) + mix(index + 2 * kGolden))) {}

  uint64_t next() { return mix(state_ += kGolden); }

  // Uniform in [0, bound); the bias of the multiply-shift is below bound / 2^32.
  int below(int bound) { return static_cast<int>(((next() >> 32) * static_cast<uint64_t>(bound)) >> 32); }

  template <class T>
  void shuffle(T* values, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(values[i], values[below(i + 1)]);
  }

 private:
  uint64_t state_;
};

}  // namespace loopmdm::sudoku
