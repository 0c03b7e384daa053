// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/philox.h"
#include "common/row_math.h"
#include "cpu/intrinsics.h"
#include "cpu/looped_blocks.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vec.h"
//
#include "cpu/tile.inl"
//
#include "cpu/math.inl"
//
#include "cpu/philox.inl"
//
#include "cpu/attention.inl"
//
#include "cpu/branch.inl"
//
#include "cpu/looped_blocks.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const LoopedBlocksKernel looped_blocks_kernel;
const LoopedBlocksKernel looped_blocks_kernel = {block_scratch_bytes, clear_block_scratch, project, finish,
                                                 row_change};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
