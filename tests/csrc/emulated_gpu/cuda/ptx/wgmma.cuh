// Emulated: see emulator.h. Operands are found as the manual's figures and its canonical layouts say;
// products are done when the last of the 128 threads has come.
#pragma once

#include "common/host_device.h"
#include "emulator.h"

namespace loopmdm {

template <class... Values>
void products_begin(Values&...) {}
inline void products_commit() {}
template <int kPending>
void products_wait() {}
template <class Values>
void pin(Values&) {}

// Element (outer, inner) of an operand in shared memory.
inline float operand_element(uint64_t descriptor, bool outer_major, int outer, int inner) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
                 stride = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t row = 256u >> (descriptor >> 62);  // bytes of a row of an atom, by the swizzle
  const uint32_t plain = outer_major ? start + outer / (row / 2) * leading + inner / 8 * stride +
                                           inner % 8 * row + outer % (row / 2) * 2
                                     : start + outer / 8 * stride + outer % 8 * row + inner * 2;
  uint16_t half;
  memcpy(&half, emulator::shared_byte(emulator::swizzled(plain, row)), 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <int kColumns>
struct WarpGroupProduct {
  struct Given {
    float* sums;
    const uint32_t* left;
    uint64_t left_descriptor, right;
    bool add, left_outer, right_outer;
  };

  template <bool kLeftOuter = false, bool kRightOuter = false>
  static void shared(float (&sums)[kColumns / 2], uint64_t left, uint64_t right, bool add) {
    Given given{sums, nullptr, left, right, add, kLeftOuter, kRightOuter};
    together(given);
  }

  template <bool kOuterMajor>
  static void registers(float (&sums)[kColumns / 2], const uint32_t* left, uint64_t right, bool add) {
    Given given{sums, left, 0, right, add, false, kOuterMajor};
    together(given);
  }

  static void together(Given& given) {
    const int group = threadIdx.x / 128;
    emulator::meet(emulator::self().block->groups[group], 128, threadIdx.x % 128, &given, multiply);
  }

  static void multiply(void** all) {
    const auto of = [all](int thread) -> Given& { return *static_cast<Given*>(all[thread]); };
    const Given& first = of(0);
    float left[64][16], right[16][kColumns];
    for (int thread = 0; thread < 128; ++thread) {
      // Warp w holds rows 16 w ..; its four registers (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8).
      for (int i = 0; first.left && i < 8; ++i) {
        const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2);
        const int inner = 2 * (thread % 4) + i % 2 + 8 * (i / 4);
        const uint32_t bits = of(thread).left[i / 2] >> 16 * (i % 2) << 16;
        memcpy(&left[row][inner], &bits, 4);
      }
    }
    for (int inner = 0; inner < 16; ++inner) {
      for (int row = 0; !first.left && row < 64; ++row) {
        left[row][inner] = operand_element(first.left_descriptor, first.left_outer, row, inner);
      }
      for (int column = 0; column < kColumns; ++column) {
        right[inner][column] = operand_element(first.right, first.right_outer, column, inner);
      }
    }
    for (int row = 0; row < 64; ++row) {
      float sums[kColumns] = {};
      for (int inner = 0; inner < 16; ++inner) {
        for (int column = 0; column < kColumns; ++column)
          sums[column] += left[row][inner] * right[inner][column];
      }
      for (int column = 0; column < kColumns; ++column) {
        // The holder of a sum, and its place there: two columns to a lane, four lanes to eight columns.
        Given& holder = of(row / 16 * 32 + row % 8 * 4 + column % 8 / 2);
        float& sum = holder.sums[column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
        sum = sums[column] + (first.add ? sum : 0.0f);
      }
    }
  }
};

}  // namespace loopmdm
