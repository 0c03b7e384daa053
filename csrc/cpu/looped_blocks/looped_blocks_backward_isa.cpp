// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/philox.h"
#include "common/row_math.h"
#include "cpu/looped_blocks/looped_blocks_backward.h"
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
#include "cpu/attention/attention_backward.inl"
//
#include "cpu/looped_blocks/branch.inl"
//
#include "cpu/looped_blocks/looped_blocks_backward.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const LoopedBlocksBackwardKernel looped_blocks_backward_kernel;
const LoopedBlocksBackwardKernel looped_blocks_backward_kernel = {
    gradient_scratch_bytes, finish_gradient, head_gradient_of, project_gradient, weight_gradient_of};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
