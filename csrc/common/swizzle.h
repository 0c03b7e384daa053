// The order in which TMA writes a tile to shared memory and WGMMA reads it: rows of 128 bytes, in which the
// 16-byte chunks are exchanged by the row's number modulo 8. Eight rows (1024 bytes) are one atom. Tiles that
// are narrower have rows of 64 or 32 bytes: again the chunk is exchanged by the number of its 128 bytes.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

constexpr uint32_t kSwizzleRowBytes = 128;
constexpr uint32_t kSwizzleAtomBytes = 8 * kSwizzleRowBytes;

// `offset`: bytes from the start of the tile, which is a multiple of the atom, as if rows lay in order.
LOOPMDM_HD uint32_t swizzle(uint32_t offset, uint32_t row_bytes) {
  return offset ^ ((offset >> 3) & (row_bytes - 16));
}

// Byte of element [row, column] in a tile of panels: `row_bytes` of columns each, all rows of a panel
// together.
LOOPMDM_HD uint32_t panel_offset(uint32_t row, uint32_t column, uint32_t rows, uint32_t element_bytes,
                                 uint32_t row_bytes = kSwizzleRowBytes) {
  const uint32_t byte = column * element_bytes;
  const uint32_t panel = byte / row_bytes, inside = byte % row_bytes;
  return panel * rows * row_bytes + swizzle(row * row_bytes + inside, row_bytes);
}

}  // namespace loopmdm
