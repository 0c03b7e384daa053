// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/philox.h"
#include "common/row_math.h"
#include "cpu/looped_blocks/looped_blocks.h"
#include "cpu/machine/intrinsics.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vector/vec.h"
//
#include "cpu/vector/tile.inl"
//
#include "cpu/vector/math.inl"
//
#include "cpu/vector/philox.inl"
//
#include "cpu/attention/attention.inl"
//
#include "cpu/looped_blocks/branch.inl"
//
#include "cpu/looped_blocks/looped_blocks.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const LoopedBlocksKernel looped_blocks_kernel;
const LoopedBlocksKernel looped_blocks_kernel = {block_scratch_bytes, clear_block_scratch, project, finish,
                                                 row_change};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
