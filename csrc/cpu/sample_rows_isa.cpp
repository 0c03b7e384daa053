// Compiled once per instruction set, with LOOPMDM_ISA naming the copy. Everything but the table at the end
// has internal linkage, and nothing of the C++ library is instantiated here: the linker would keep one copy
// of an inline function for the whole module, possibly the one this processor cannot run.
#include "common/philox.h"
#include "common/row_math.h"
#include "cpu/intrinsics.h"
#include "cpu/linear.h"
#include "cpu/sample_rows.h"

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
#include "cpu/head.inl"
//
#include "cpu/sample_rows.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const SampleRowsKernel sample_rows_kernel;
const SampleRowsKernel sample_rows_kernel = {prepare_rows, scan, race_among};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
