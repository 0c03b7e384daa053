// Philox4x32-10 for 2 * kLanes consecutive words.
#pragma once

#include "cpu/vector/vec.h"

// Words 0..3 of counters (first_group + i, x1, x2, x3) for i = 0 .. kLanes / 2 - 1.
inline void philox_groups(const PhiloxKey& key, uint32_t first_group, uint32_t counter1, uint32_t counter2,
                          uint32_t counter3, uint32_t* words) {
  constexpr uint64_t kLow = 0xffffffffu;
  Quads x0, x1 = Quads{} + counter1, x2 = Quads{} + counter2, x3 = Quads{} + counter3;
  for (int i = 0; i < kLanes / 2; ++i) x0[i] = first_group + static_cast<uint32_t>(i);
  const Quads multiplier0 = Quads{} + kPhiloxMultiplier0, multiplier1 = Quads{} + kPhiloxMultiplier1;
  uint32_t key0 = key.word0, key1 = key.word1;
  // High halves of the lanes may hold anything on the way: only low halves are multiplied and kept.
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Quads product0 = multiply_low(multiplier0, x0), product1 = multiply_low(multiplier1, x2);
    x0 = (product1 >> 32) ^ x1 ^ static_cast<uint64_t>(key0);
    x2 = (product0 >> 32) ^ x3 ^ static_cast<uint64_t>(key1);
    x1 = product1;
    x3 = product0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  store_interleaved(words, (x0 & kLow) | (x1 << 32), (x2 & kLow) | (x3 << 32));
}
