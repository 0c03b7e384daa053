// Emulated: see emulator.h. A map is written down by the test: address, bytes of an element, columns, rows,
// matrices, bytes from row to row and from matrix to matrix, columns and rows of a box.
#pragma once

#include "common/host_device.h"
#include "cuda/ptx/mbarrier.cuh"
#include "emulator.h"

namespace loopmdm {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

inline void load_box(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                     int matrix) {
  const uint64_t* const words = map->words;
  const uint32_t row_bytes = words[7] * words[1], bytes = row_bytes * words[8];
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || words[0] % 16 != 0 || words[5] % 16 != 0 ||
      words[6] % 16 != 0) {
    emulator::fail("a map or its tensor is not aligned");
  }
  if (words[7] > 256 || words[8] > 256 || (row_bytes != 32 && row_bytes != 64 && row_bytes != 128)) {
    emulator::fail("a box is larger than TMA takes, or not as wide as its swizzle");
  }
  // The swizzle repeats after eight rows: from there operands are counted.
  if (target % std::max(8 * row_bytes, 128u) != 0) emulator::fail("a box is not aligned in shared memory");
  emulator::shared_byte(target + bytes - 1);
  require_fence(barrier);
  emulator::Block* const block = emulator::self().block;
  emulator::begin_copy(*block, target, bytes);
  const auto copy = [=, described = *map, fenced = emulator::self().known.proxied]() -> int64_t {
    const uint64_t* const w = described.words;
    const int64_t bytes = w[1], box_columns = w[7], box_rows = w[8];
    const auto visible = [&](const emulator::Tag& tag) {
      return tag.thread < 0 || tag.time <= fenced[emulator::clock_of(tag.thread)];
    };
    for (int64_t r = 0; r < box_rows; ++r) {
      const int64_t columns = std::min(box_columns, int64_t(w[2]) - column);
      if (columns > 0 && row + r < int64_t(w[3]) && matrix < int64_t(w[4])) {
        const auto* const line =
            reinterpret_cast<const uint8_t*>(w[0]) + matrix * w[6] + (row + r) * w[5] + column * bytes;
        if (!emulator::all_tags(line, columns * bytes, false, visible)) {
          emulator::fault = "a bulk copy of what a thread stores, without order and proxy fence";
        }
      }
      for (int64_t c = 0; c < box_columns; ++c) {
        const bool inside = column + c < int64_t(w[2]) && row + r < int64_t(w[3]) && matrix < int64_t(w[4]);
        const uint8_t* const source =
            reinterpret_cast<const uint8_t*>(w[0]) + matrix * w[6] + (row + r) * w[5] + (column + c) * bytes;
        const uint32_t plain = target + (r * box_columns + c) * bytes;
        uint8_t* const place =
            block->shared + emulator::swizzled(plain, box_columns * bytes) - emulator::kSharedBase;
        if (inside) {
          memcpy(place, source, bytes);
        } else {
          memset(place, 0, bytes);
        }
      }
    }
    emulator::end_copy(*block, target, box_rows * box_columns * bytes);
    return box_rows * box_columns * bytes;
  };
  emulator::state->loads.push_back({block, barrier, copy});
}

// Only weights are loaded to be kept in L2.
inline void load_box(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row, int matrix,
                     uint64_t) {
  emulator::weight_bytes += map->words[1] * map->words[7] * map->words[8];
  load_box(target, map, barrier, column, row, matrix);
}

}  // namespace loopmdm
