#include "cpu/head/head_logits_backward.h"

#include "cpu/head/row_groups.h"
#include "cpu/machine/isa_table.h"

namespace loopmdm::cpu {

LOOPMDM_DECLARE_KERNEL(MaskedCrossEntropyKernel, masked_cross_entropy_kernel)

void head_logits_backward(const MaskedCrossEntropyProblem& p, const LogitGradients& given,
                          const MaskedCrossEntropyGradients& out, Isa isa, int num_threads) {
  if (p.num_rows == 0) return;
  const MaskedCrossEntropyKernel& kernel = LOOPMDM_KERNEL(masked_cross_entropy_kernel, isa);
  gradients_of_groups(
      p, kernel, out, num_threads, [](const RowGroup&) {},
      [&](const RowGroup& group, const TokenRange& tokens, char* scratch, float* rows_grad) {
        kernel.products(p, group, tokens, given, scratch, out, rows_grad);
      });
}

}  // namespace loopmdm::cpu
