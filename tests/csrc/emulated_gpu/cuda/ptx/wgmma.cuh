// Emulated: see emulator.h. Operands are found as the manual's figures and its canonical layouts say. Until
// the wait that covers a product, its sums are poison and its left operand in registers may not change.
#pragma once

#include "common/host_device.h"
#include "emulator.h"

namespace loopmdm {

namespace emulated_products {

using emulator::Product;
using Four = float __attribute__((vector_size(16)));

constexpr uint32_t kPoison = 0x7F85EAD5;  // a signalling NaN: arithmetic makes another of it

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct Descriptor {
  uint32_t start, leading, stride;
  uint32_t row;  // bytes of a row of an atom, by the swizzle

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) << 4),
        leading((bits >> 16 & 0x3FFF) << 4),
        stride((bits >> 32 & 0x3FFF) << 4),
        row(256u >> (bits >> 62)) {}
};

// Notes which lines of shared memory a product reads, atoms of eight rows. `number`: of the operand's outer
// dimension from `first_outer` on.
inline void note_reads(emulator::Block& block, int warp, uint32_t product, uint32_t arrived, uint64_t bits,
                       bool outer_major, uint32_t first_outer, uint32_t number) {
  const Descriptor descriptor(bits);
  const uint32_t row = descriptor.row, atom = 8 * row, start = descriptor.start / atom * atom;
  if (!outer_major && descriptor.start % atom >= row) emulator::fail("an operand begins inside of an atom");
  if (outer_major && descriptor.start != start) emulator::fail("an operand begins inside of an atom");
  const auto reads = [&](uint32_t address) {
    emulator::product_reads(block, warp, product, address, atom, arrived);
  };
  if (outer_major) {
    for (uint32_t panel = first_outer / (row / 2); panel <= (first_outer + number - 1) / (row / 2); ++panel) {
      for (uint32_t i = 0; i < 2; ++i) reads(start + panel * descriptor.leading + i * descriptor.stride);
    }
  } else {
    for (uint32_t i = first_outer / 8; i < (first_outer + number) / 8; ++i)
      reads(start + i * descriptor.stride);
  }
}

// Elements (outer from `first_outer` on, inner) of an operand in shared memory, eight that lie together at a
// time, to values[inner][outer].
template <bool kOuterMajor, int kNumber>
void read_operand(float (&values)[16][kNumber], const emulator::Block& block, uint64_t descriptor,
                  int first_outer) {
  const auto [start, leading, stride, row] = Descriptor(descriptor);
  const auto read_eight = [&](uint32_t plain, float* to, int step) {
    uint16_t halves[8];
    const uint32_t place = emulator::swizzled(plain, row) - emulator::kSharedBase;
    memcpy(halves, block.shared + place, 16);
    if (memcmp(halves, &block.copied[place], 16) != 0) {
      emulator::fault = "a product reads what a thread has stored, without proxy fence";
    }
    for (int i = 0; i < 8; ++i) to[i * step] = of_bits(static_cast<uint32_t>(halves[i]) << 16);
  };
  if (kOuterMajor) {
    for (int inner = 0; inner < 16; ++inner) {
      for (int i = 0; i < kNumber; i += 8) {
        const uint32_t outer = first_outer + i;
        read_eight(start + outer / (row / 2) * leading + inner / 8 * stride + inner % 8 * row +
                       outer % (row / 2) * 2,
                   &values[inner][i], 1);
      }
    }
  } else {
    for (int i = 0; i < kNumber; ++i) {
      const uint32_t outer = first_outer + i, line = start + outer / 8 * stride + outer % 8 * row;
      read_eight(line, &values[0][i], kNumber);
      read_eight(line + 16, &values[8][i], kNumber);
    }
  }
}

template <int kColumns, bool kFromRegisters, bool kLeftOuter, bool kRightOuter>
void multiply(const Product& product, const emulator::Block& block, int warp) {
  alignas(16) float left[16][16], right[16][kColumns];  // [inner, row], [inner, column]
  if (kFromRegisters) {
    // Four registers of a lane: (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8).
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + 8 * (i / 2 % 2), inner = 2 * (lane % 4) + i % 2 + 8 * (i / 4);
        left[inner][row] = of_bits(product.left[lane][i / 2] >> 16 * (i % 2) << 16);
      }
    }
  } else {
    read_operand<kLeftOuter>(left, block, product.left_descriptor, 16 * (warp % 4));
  }
  read_operand<kRightOuter>(right, block, product.right_descriptor, 0);
  for (int row = 0; row < 16; ++row) {
    Four sums[kColumns / 4] = {};
    for (int inner = 0; inner < 16; ++inner) {
      for (int i = 0; i < kColumns / 4; ++i) {
        Four four;
        memcpy(&four, &right[inner][4 * i], 16);
        sums[i] += left[inner][row] * four;
      }
    }
    for (int column = 0; column < kColumns; ++column) {
      // The holder of a sum, and its place there: two columns to a lane, four lanes to eight columns.
      const int lane = row % 8 * 4 + column % 8 / 2;
      float& sum = product.values[lane][column / 8 * 4 + row / 8 * 2 + column % 2];
      sum = sums[column / 4][column % 4] + (product.add ? sum : 0.0f);
    }
  }
}

// The values of these sums, which are under way from now on.
inline float* take_sums(emulator::ThreadProducts& thread, float* registers, int number) {
  for (auto& sums : thread.sums) {
    if (sums.registers == registers && sums.number == number) {
      sums.end = thread.issued;
      return sums.values.get();
    }
    if (registers < sums.registers + sums.number && sums.registers < registers + number) {
      emulator::fail("a product on a part of the sums of another");
    }
  }
  if (!thread.has_fenced(registers, 4 * number))
    emulator::fail("no wgmma.fence between the use of sums and a product");
  std::unique_ptr<float[]> values(new float[number]);
  float* const taken = values.get();
  for (int i = 0; i < number; ++i) {
    taken[i] = registers[i];
    registers[i] = of_bits(kPoison);
  }
  thread.sums.push_back({registers, number, std::move(values), thread.issued});
  return taken;
}

inline void issue(float* sums, int number, const uint32_t* left, uint64_t left_descriptor, bool left_outer,
                  uint64_t right_descriptor, bool right_outer, bool add,
                  void (*multiply)(const Product&, const emulator::Block&, int)) {
  emulator::executed_together("wgmma");
  emulator::Fiber& fiber = emulator::self();
  emulator::ThreadProducts& thread = fiber.products;
  emulator::WarpProducts& warp = fiber.block->products[fiber.thread / 32];
  const size_t place = thread.issued - warp.done;
  auto& descriptors = fiber.block->descriptors[fiber.thread / 128];
  if (descriptors.size() == thread.issued) descriptors.push_back({left_descriptor, right_descriptor});
  if (descriptors[thread.issued] != std::make_pair(left_descriptor, right_descriptor)) {
    emulator::fail("threads of a warp group have different descriptors");
  }
  if (warp.under_way.size() == place) {
    warp.under_way.emplace_back();
    warp.under_way.back().left_descriptor = left_descriptor;
    warp.under_way.back().right_descriptor = right_descriptor;
    warp.under_way.back().add = add;
    warp.under_way.back().multiply = multiply;
  }
  Product& product = warp.under_way[place];
  if (product.add != add || product.multiply != multiply)
    emulator::fail("lanes of a warp issue different products");
  ++thread.issued;
  ++product.lanes;
  product.values[fiber.thread % 32] = take_sums(thread, sums, number);
  if (product.lanes == 32) {
    uint32_t arrived = ~0u;  // known to all lanes
    for (int lane = 0; lane < 32; ++lane) {
      const emulator::Fiber& other = *emulator::state->fibers[fiber.number - fiber.thread % 32 + lane];
      arrived = std::min(arrived, other.known.times[fiber.block->first_clock + emulator::kCopies]);
    }
    const auto note = [&](uint64_t bits, bool outer_major, uint32_t first, uint32_t rows) {
      note_reads(*fiber.block, fiber.thread / 32, warp.done + place, arrived, bits, outer_major, first, rows);
    };
    if (!left) note(left_descriptor, left_outer, 16 * (fiber.thread % 128 / 32), 16);
    note(right_descriptor, right_outer, 0, 2 * number);
  }
  if (!left) return;
  if (!thread.has_fenced(left, 16))
    emulator::fail("no wgmma.fence between the use of a left operand and a product");
  auto& words = product.left[fiber.thread % 32];
  memcpy(words, left, 16);
  thread.operands.push_back({left, {words[0], words[1], words[2], words[3]}, thread.issued});
}

// Registers of products before number `end` are the thread's again.
inline void give_back(emulator::ThreadProducts& thread, uint64_t end) {
  const auto over = [end](const auto& registers) { return registers.end <= end; };
  for (const auto& operand : thread.operands) {
    if (over(operand) && memcmp(operand.registers, operand.words, 16) != 0) {
      emulator::fail("a left operand has changed under a product");
    }
  }
  for (const auto& sums : thread.sums) {
    if (!over(sums)) continue;
    for (int i = 0; i < sums.number; ++i) {
      if (bits_of(sums.registers[i]) != kPoison) emulator::fail("sums have changed under a product");
      sums.registers[i] = sums.values[i];
    }
  }
  const auto forget = [&](auto& list) {
    list.erase(std::remove_if(list.begin(), list.end(), over), list.end());
  };
  forget(thread.operands);
  forget(thread.sums);
}

}  // namespace emulated_products

// Names the registers that products may use from now on.
template <class... Values>
void products_begin(Values&... values) {
  emulator::executed_together("wgmma.fence");
  auto& fenced = emulator::self().products.fenced;
  (fenced.push_back({reinterpret_cast<const uint8_t*>(&values), sizeof(values)}), ...);
}

inline void products_commit() {
  emulator::executed_together("wgmma.commit_group");
  auto& thread = emulator::self().products;
  thread.groups.push_back(thread.issued);
}

template <int kPending>
void products_wait() {
  emulator::executed_together("wgmma.wait_group");
  emulator::Fiber& fiber = emulator::self();
  emulator::ThreadProducts& thread = fiber.products;
  uint64_t end = 0;
  for (; thread.groups.size() > kPending; thread.groups.pop_front()) end = thread.groups.front();
  emulator::WarpProducts& warp = fiber.block->products[fiber.thread / 32];
  emulator::wait_until([&warp, end] { return warp.done >= end; });
  if (warp.waited.size() < end) warp.waited.resize(end, emulator::state->now[fiber.clock]);
  emulated_products::give_back(thread, end);
  thread.fenced.clear();
}

template <class Values>
void pin(Values& values) {
  for (const auto& sums : emulator::self().products.sums) {
    if (static_cast<const void*>(sums.registers) == &values)
      emulator::fail("sums are used before the wait for their products");
  }
}

template <int kColumns>
struct WarpGroupProduct {
  template <bool kLeftOuter = false, bool kRightOuter = false>
  static void shared(float (&sums)[kColumns / 2], uint64_t left, uint64_t right, bool add) {
    emulated_products::issue(sums, kColumns / 2, nullptr, left, kLeftOuter, right, kRightOuter, add,
                             emulated_products::multiply<kColumns, false, kLeftOuter, kRightOuter>);
  }

  template <bool kOuterMajor>
  static void registers(float (&sums)[kColumns / 2], const uint32_t* left, uint64_t right, bool add) {
    emulated_products::issue(sums, kColumns / 2, left, 0, false, right, kOuterMajor, add,
                             emulated_products::multiply<kColumns, true, false, kOuterMajor>);
  }
};

}  // namespace loopmdm
