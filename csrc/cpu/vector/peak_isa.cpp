// Compiled once per instruction set; see sample_rows_isa.cpp for what such a file may contain.
#include "cpu/machine/intrinsics.h"
#include "cpu/vector/peak.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/vector/vec.h"
//
#include "cpu/vector/tile.inl"
//
#include "cpu/vector/peak.inl"

}  // namespace

namespace LOOPMDM_ISA {
extern const PeakKernel peak_kernel;
const PeakKernel peak_kernel = {fp32_chains, bf16_chains, kFp32FlopsPerRound, kBf16FlopsPerRound};
}  // namespace LOOPMDM_ISA

}  // namespace loopmdm::cpu
