// Gradients of head_logits: those of masked_cross_entropy, where the logits' gradients are given.
#pragma once

#include "cpu/head/masked_cross_entropy.h"

namespace loopmdm::cpu {

// `problem` has no targets, excludes no token and has each row once. A row of `given` that is zero throughout
// is left out: of MDLM's loss only those of masked tokens have a gradient.
void head_logits_backward(const MaskedCrossEntropyProblem& problem, const LogitGradients& given,
                          const MaskedCrossEntropyGradients& out, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
