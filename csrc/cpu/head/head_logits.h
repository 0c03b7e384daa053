// head_logits on the CPU: the vocabulary head's logits of selected rows, in memory.
#pragma once

#include "cpu/head/head.h"
#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

// The functions of one instruction set.
struct HeadLogitsKernel {
  int64_t (*logits_scratch)(const HeadProblem&, int64_t rows);  // in floats
  void (*prepare)(const HeadProblem&, int64_t begin, int64_t end, float* row, uint32_t* operands);
  // Logits of `num_rows` rows in one chunk of the vocabulary, in bf16 or in float. `sums`: scratch for these
  // rows; out: those rows of [R, V].
  void (*project)(const HeadProblem&, const uint32_t* operands, int64_t num_rows, int64_t chunk, float* sums,
                  bool bf16_out, void* out);
};

LOOPMDM_KERNEL(HeadLogitsKernel, head_logits_kernel)

// out: [R, V], bf16 if bf16_out, else float.
void head_logits(const HeadProblem& problem, bool bf16_out, void* out, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
