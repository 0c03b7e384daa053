#include "cpu/head/head_logits_backward.h"

#include "cpu/head/row_groups.h"

namespace loopmdm::cpu {

void head_logits_backward(const MaskedCrossEntropyProblem& p, const LogitGradients& given,
                          const MaskedCrossEntropyGradients& out, Isa isa, int num_threads) {
  if (p.num_rows == 0) return;
  const MaskedCrossEntropyKernel& kernel = masked_cross_entropy_kernel(isa);
  gradients_of_groups(
      p, kernel, out, num_threads, [](const RowGroup&) {},
      [&](const RowGroup& group, const TokenRange& tokens, char* scratch, float* grad_rows) {
        kernel.products(p, group, tokens, given, scratch, out, grad_rows);
      });
}

}  // namespace loopmdm::cpu
