// Reads and checks the weights of blocks.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/looped_blocks/looped_blocks.h"

namespace loopmdm {

// blocks: for each block the tensors of BlockWeights, linear weights packed by pack_linear for `isa`. Throws
// like TensorView.
std::vector<cpu::BlockPointers> block_pointers(const pybind11::sequence& blocks, int64_t hidden,
                                               int64_t width, int64_t heads, bool bf16, cpu::Isa isa);

// F of the first block.
int64_t block_width(const pybind11::sequence& blocks);

}  // namespace loopmdm
