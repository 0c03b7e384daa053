// Which elements of a 64-row WGMMA tile a thread of the warp group holds (PTX ISA, "Register fragments").
#pragma once

#include "common/host_device.h"

namespace loopmdm {

// Sums: four to each 8 columns; `index` = 4 * (column / 8) + 2 * (lower eight rows of the warp's 16) + column
// % 2.
LOOPMDM_HD int fragment_row(int thread, int index) {
  return 16 * (thread / 32) + (thread % 32) / 4 + 8 * ((index >> 1) & 1);
}

LOOPMDM_HD int fragment_column(int thread, int index) {
  return 8 * (index >> 2) + 2 * (thread % 4) + (index & 1);
}

// Left operand: 16 columns in four registers of two bf16; register r holds rows as sums do, columns in pairs.
LOOPMDM_HD int operand_row(int thread, int reg) { return fragment_row(thread, 2 * (reg & 1)); }

LOOPMDM_HD int operand_column(int thread, int reg) { return 2 * (thread % 4) + 8 * (reg >> 1); }

// Which 16 columns of a panel of 32 floats a lane reads when the warp is at `step`: lanes of odd rows go
// through them in the other order. Rows 2i and 2i + 1 have the same swizzle of 32-byte pieces, and would meet
// in the same banks.
LOOPMDM_HD int stream_step(int thread, int step) { return step ^ (((thread % 32) / 4) & 1); }

// The four lanes of a quad hold pairs of columns that alternate, in four groups of eight columns. To store
// runs of 16 bytes they transpose lanes and groups: for bit 1 and then 2 of the lane, they exchange with the
// lane that differs in it one word of each pair (low, low | bit), and put what they get where it was.
LOOPMDM_HD int quad_word(int lane, int bit, int low) { return (lane & bit) != 0 ? low : low | bit; }

}  // namespace loopmdm
