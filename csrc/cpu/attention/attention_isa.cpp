// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/row_math.h"
#include "cpu/attention/attention.h"
#include "cpu/machine/intrinsics.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vector/vec.h"
//
#include "cpu/vector/tile.inl"
//
#include "cpu/vector/math.inl"
//
#include "cpu/attention/attention.inl"
//
#include "cpu/attention/attention_backward.inl"
//
#include "cpu/attention/attention_heads.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const AttentionKernel attention_kernel;
const AttentionKernel attention_kernel = {kPackedRows,        kAttendRows,         packed_head_bytes,
                                          head_scratch_bytes, backward_head_bytes, pack_head,
                                          attend_head,        backward_head};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
