// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/row_math.h"
#include "cpu/head_logits.h"
#include "cpu/intrinsics.h"
#include "cpu/linear.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vec.h"
//
#include "cpu/tile.inl"
//
#include "cpu/math.inl"
//
#include "cpu/head.inl"
//
#include "cpu/head_logits.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const HeadLogitsKernel head_logits_kernel;
const HeadLogitsKernel head_logits_kernel = {prepare_rows, project};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
