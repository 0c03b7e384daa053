// How WGMMA is told where an operand lies in shared memory (PTX ISA, "Matrix descriptor"): addresses and
// strides in units of 16 bytes, bits 62-63 the swizzle (1: 128 bytes, 2: 64, 3: 32).
#pragma once

#include "common/host_device.h"
#include "common/swizzle.h"

namespace loopmdm {

// `row_bytes`: of a panel, which is as wide as its swizzle. Eight rows are an atom, every `apart`-th is
// taken.
LOOPMDM_HD uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t row_bytes,
                                      uint32_t apart = 1) {
  const uint64_t kind = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(apart * 8 * row_bytes >> 4) << 32 | kind << 62;
}

// Operand whose inner dimension (K) lies along the rows of a panel: eight of its rows or columns are an atom.
// The leading stride means nothing in this layout. `step`: 16 elements of K, 32 bytes of the panel's row.
LOOPMDM_HD uint64_t inner_major_descriptor(uint32_t panel, uint32_t step,
                                           uint32_t row_bytes = kSwizzleRowBytes, uint32_t apart = 1) {
  return matrix_descriptor(panel + 32 * step, 16, row_bytes, apart);
}

// Operand whose rows run along its outer dimension (N), one row for each K: the values of attention. Eight K
// are an atom, what a row of N does not hold is in the next panel. `step`: 16 of K, two atoms.
LOOPMDM_HD uint64_t outer_major_descriptor(uint32_t panel, uint32_t panel_bytes, uint32_t step,
                                           uint32_t row_bytes = kSwizzleRowBytes) {
  return matrix_descriptor(panel + 16 * row_bytes * step, panel_bytes, row_bytes);
}

}  // namespace loopmdm
