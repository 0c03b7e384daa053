// The processor's peak rate: multiply-add chains that are independent of each other and never leave the
// registers. No kernel can be faster.
#pragma once

#include <cstdint>

#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

// The functions of one instruction set.
struct PeakKernel {
  // Run the chains for `rounds` rounds from values near `start`; the result depends on every chain.
  float (*fp32)(int64_t rounds, float start);
  float (*bf16)(int64_t rounds, float start);  // fp32's where no instruction multiplies bf16 pairs
  double fp32_flops_per_round;
  double bf16_flops_per_round;
};

LOOPMDM_KERNEL(PeakKernel, peak_kernel)

// FLOP/s of `num_threads` threads together, each busy for about `milliseconds`; an addition and a
// multiplication count one each.
double peak_flops(bool dtype_is_bf16, Isa isa, int num_threads, double milliseconds);

}  // namespace loopmdm::cpu
