// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
// Random numbers are named, not drawn in sequence: counter (token / 4, position, step, sequence), key seed.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Set in counter word 0: the low half of a 64-bit uniform.
constexpr uint32_t kRefineBit = 1u << 31;
constexpr uint32_t kDropoutStream = 1u << 31;  // in the step word: dropout masks
// High halves below this are refined by 32 more bits, so a small uniform keeps its relative precision.
constexpr uint32_t kRefineBelow = 1u << 8;

struct PhiloxKey {
  uint32_t word0, word1;
};

struct PhiloxWords {
  uint32_t word[4];
};

LOOPMDM_HD PhiloxKey philox_key(uint64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

LOOPMDM_HD PhiloxWords philox4x32(PhiloxKey key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key.word0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.word1;
    c3 = static_cast<uint32_t>(product0);
    key.word0 += kPhiloxWeyl0;
    key.word1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in (0, 1] from its high 32 bits, for high >= kRefineBelow.
LOOPMDM_HD float uniform_coarse(uint32_t high) { return (static_cast<float>(high) + 0.5f) * 0x1p-32f; }

// Uniform in (0, 2^-24) from 64 bits, for high < kRefineBelow.
LOOPMDM_HD float uniform_refined(uint32_t high, uint32_t low) {
  return (static_cast<float>(high) + (static_cast<float>(low) + 0.5f) * 0x1p-32f) * 0x1p-32f;
}

}  // namespace loopmdm
