// Compiled once per instruction set, like every *_isa.cpp: see sample_rows_isa.cpp.
#include "common/row_math.h"
#include "cpu/intrinsics.h"
#include "cpu/linear.h"
#include "cpu/masked_cross_entropy.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vec.h"
//
#include "cpu/tile.inl"
//
#include "cpu/math.inl"
//
#include "cpu/masked_cross_entropy_tiles.inl"
//
#include "cpu/masked_cross_entropy_rows.inl"
//
#include "cpu/masked_cross_entropy_exponentials.inl"
//
#include "cpu/masked_cross_entropy_statistics.inl"
//
#include "cpu/masked_cross_entropy_gradients.inl"
//
#include "cpu/masked_cross_entropy.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const MaskedCrossEntropyKernel masked_cross_entropy_kernel;
const MaskedCrossEntropyKernel masked_cross_entropy_kernel = {sizes,    prepare,   statistics,    gradients,
                                                              products, norm_sums, norm_gradients};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
