// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/philox.h"
#include "common/row_math.h"
#include "cpu/intrinsics.h"
#include "cpu/looped_blocks_backward.h"

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
#include "cpu/attention_backward.inl"
//
#include "cpu/branch.inl"
//
#include "cpu/looped_blocks_backward.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const LoopedBlocksBackwardKernel looped_blocks_backward_kernel;
const LoopedBlocksBackwardKernel looped_blocks_backward_kernel = {
    gradient_scratch_bytes, finish_gradient, head_gradient_of, project_gradient, weight_gradient_of};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
