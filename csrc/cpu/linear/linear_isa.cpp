// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "cpu/linear/linear.h"
#include "cpu/machine/intrinsics.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vector/vec.h"
//
#include "cpu/vector/tile.inl"
//
#include "cpu/linear/linear.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const LinearKernel linear_kernel_table;
const LinearKernel linear_kernel_table = {kLanes, kPanel, 2 / Narrow::kPerWord, pack_panel};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
