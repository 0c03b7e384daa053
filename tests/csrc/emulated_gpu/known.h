// What a thread knows to have been done by others: what it may rely on because signals say so.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace emulator {

// A block's warps, and behind them all of its asynchronous copies, have clocks.
constexpr int kWarps = 12, kCopies = kWarps, kClocks = kWarps + 1;

// Up to which time of each clock. A thread's knowledge goes along with its signals to those who see them.
struct Known {
  std::vector<uint32_t> times;    // by ordinary accesses
  std::vector<uint32_t> proxied;  // and by bulk copies: a proxy fence lies between

  explicit Known(size_t clocks = 0) : times(clocks), proxied(clocks) {}

  void learn(const Known& other) {
    if (times.size() < other.times.size()) {
      times.resize(other.times.size());
      proxied.resize(other.times.size());
    }
    for (size_t i = 0; i < other.times.size(); ++i) {
      times[i] = std::max(times[i], other.times[i]);
      proxied[i] = std::max(proxied[i], other.proxied[i]);
    }
  }
};

}  // namespace emulator
