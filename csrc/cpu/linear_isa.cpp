// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "cpu/intrinsics.h"
#include "cpu/linear.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vec.h"
//
#include "cpu/tile.inl"
//
#include "cpu/linear.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const LinearKernel linear_kernel_table;
const LinearKernel linear_kernel_table = {kLanes, kPanel, 2 / Narrow::kPerWord, pack_panel};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
