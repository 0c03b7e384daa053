// Emulated: see emulator.h. A map is written down by the test: address, bytes of an element, columns, rows,
// matrices, bytes from row to row and from matrix to matrix, columns and rows of a box.
#pragma once

#include "common/host_device.h"
#include "emulator.h"

namespace loopmdm {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

inline void load_box(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                     int matrix) {
  emulator::Block* const block = emulator::self().block;
  const auto copy = [=, described = *map]() -> int64_t {
    const uint64_t* const w = described.words;
    const int64_t bytes = w[1], box_columns = w[7], box_rows = w[8];
    for (int64_t r = 0; r < box_rows; ++r) {
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
