// Compiled once per instruction set, with LOOPMDM_ISA naming the copy. Everything but the table at the end
// has internal linkage, and nothing of the C++ library is instantiated here: the linker would keep one copy
// of an inline function for the whole module, possibly the one this processor cannot run.
#include "common/philox.h"
#include "common/row_math.h"
#include "cpu/head/sample_rows.h"
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
#include "cpu/vector/philox.inl"
//
#include "cpu/head/head.inl"
//
#include "cpu/head/sample_rows.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const SampleRowsKernel sample_rows_kernel;
const SampleRowsKernel sample_rows_kernel = {prepare_rows, scan, race_among};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
