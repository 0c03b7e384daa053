// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/row_math.h"
#include "cpu/head/head_logits.h"
#include "cpu/linear/linear.h"
#include "cpu/machine/intrinsics.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vector/vec.h"
//
#include "cpu/vector/tile.inl"
//
#include "cpu/vector/math.inl"
//
#include "cpu/head/head.inl"
//
#include "cpu/head/head_logits.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const HeadLogitsKernel head_logits_kernel;
const HeadLogitsKernel head_logits_kernel = {prepare_rows, project};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
