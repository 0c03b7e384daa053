// Emulated: see emulator.h. Done when the last of the 32 lanes has come.
#pragma once

#include "common/host_device.h"
#include "emulator.h"

namespace loopmdm {

inline float of_bf16(uint32_t word, int upper) {
  const uint32_t bits = word >> 16 * upper << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline void multiply_add(float* sums, const uint32_t (&left)[4], uint32_t right_low, uint32_t right_high) {
  struct Given {
    float* sums;
    const uint32_t* left;
    uint32_t right[2];
  } given{sums, left, {right_low, right_high}};
  emulator::meet_in_warp("mma", &given, [](void** all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Given& of = *static_cast<Given*>(all[lane]);
      const int group = lane / 4, pair = 2 * (lane % 4);
      for (int i = 0; i < 8;
           ++i) {  // a0, a1: (group, pair); a2, a3: eight rows lower; a4 ..: eight columns on
        a[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = of_bf16(of.left[i / 2], i % 2);
      }
      for (int i = 0; i < 4; ++i) b[pair + i % 2 + 8 * (i / 2)][group] = of_bf16(of.right[i / 2], i % 2);
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* const sums = static_cast<Given*>(all[lane])->sums;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        sums[i] += sum;
      }
    }
  });
}

inline void load_matrices(uint32_t (&values)[4], uint32_t address, bool transposed = false) {
  emulator::read_shared(address);
  struct Given {
    uint32_t* values;
    uint32_t address;
    bool transposed;
  } given{values, address, transposed};
  emulator::meet_in_warp("ldmatrix", &given, [](void** all) {
    for (int lane = 0; lane < 32; ++lane) {
      Given& of = *static_cast<Given*>(all[lane]);
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t halves[2];
        for (int i = 0; i < 2; ++i) {
          const int row = of.transposed ? 2 * (lane % 4) + i : lane / 4;
          const int column = of.transposed ? lane / 4 : 2 * (lane % 4) + i;
          const uint32_t start = static_cast<Given*>(all[8 * matrix + row])->address;
          memcpy(&halves[i], emulator::shared_byte(start + 2 * column), 2);
        }
        of.values[matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
      }
    }
  });
}

inline void load_transposed_matrices(uint32_t (&values)[4], uint32_t address) {
  load_matrices(values, address, true);
}

}  // namespace loopmdm
