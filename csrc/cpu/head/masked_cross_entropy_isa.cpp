// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/row_math.h"
#include "cpu/head/masked_cross_entropy.h"
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
#include "cpu/head/masked_cross_entropy_tiles.inl"
//
#include "cpu/head/masked_cross_entropy_rows.inl"
//
#include "cpu/head/masked_cross_entropy_exponentials.inl"
//
#include "cpu/head/masked_cross_entropy_statistics.inl"
//
#include "cpu/head/masked_cross_entropy_gradients.inl"
//
#include "cpu/head/masked_cross_entropy.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const MaskedCrossEntropyKernel masked_cross_entropy_kernel;
const MaskedCrossEntropyKernel masked_cross_entropy_kernel = {sizes,    prepare,   statistics,    gradients,
                                                              products, norm_sums, norm_gradients};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
