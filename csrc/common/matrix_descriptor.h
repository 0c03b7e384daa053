// How WGMMA is told where an operand lies in shared memory (PTX ISA, "Matrix descriptor"): addresses and
// strides in units of 16 bytes, bits 62-63 the swizzle (1: 128 bytes).
#pragma once

#include "common/host_device.h"
#include "common/swizzle.h"

namespace loopmdm {

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;

LOOPMDM_HD uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kSwizzle128;
}

// Operand whose inner dimension (K) lies along the rows of a panel: eight of its rows or columns are an atom.
// The leading stride means nothing in this layout. `step`: 16 elements of K, 32 bytes of the panel's row.
LOOPMDM_HD uint64_t inner_major_descriptor(uint32_t panel, uint32_t step) {
  return matrix_descriptor(panel + 32 * step, 16, kSwizzleAtomBytes);
}

// Operand whose rows of 128 bytes run along its outer dimension (N), one row for each K: the values of
// attention. Eight K are an atom, the next 64 of N are the next panel. `step`: 16 of K, two atoms.
LOOPMDM_HD uint64_t outer_major_descriptor(uint32_t panel, uint32_t panel_bytes, uint32_t step) {
  return matrix_descriptor(panel + 2 * kSwizzleAtomBytes * step, panel_bytes, kSwizzleAtomBytes);
}

}  // namespace loopmdm
