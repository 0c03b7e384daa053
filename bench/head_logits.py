"""head_logits, forward alone and with every gradient, beside plain PyTorch: training through the logits."""

from __future__ import annotations

import pytest
import torch

import loopmdm_kernels as lk
from bench import peers
from bench.run import DTYPES, REAL
from loopmdm_kernels.testing import head_inputs
from loopmdm_kernels.types import Head

LENGTH, HIDDEN, VOCAB = 512, REAL.hidden, REAL.vocab_size


def logits_and_gradients(function, dtype, backward):
    """One call in `dtype`: the logits, and the gradients of all leaves where `backward` is set."""
    hidden, exact = head_inputs(1, LENGTH, HIDDEN, VOCAB)
    leaves = [hidden.float(), *(tensor.to(dtype) for tensor in exact[:4])]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    grad = torch.full((1, LENGTH, VOCAB), 1e-3, dtype=dtype)

    def run():
        with torch.set_grad_enabled(backward):
            logits = function(leaves[0], Head(*leaves[1:]))
        return torch.autograd.grad(logits, leaves, grad) if backward else logits

    return run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("name", DTYPES)
def test_head_logits(compare, name, backward):
    variants = {}
    for kind in DTYPES if name == "bf16" else ("fp32",):
        plain = peers.head_logits
        variants[f"eager {kind}"] = logits_and_gradients(plain, DTYPES[kind], backward)
        variants[f"compiled {kind}"] = logits_and_gradients(peers.compiled(plain), DTYPES[kind], backward)
    compare(
        logits_and_gradients(lk.head_logits, DTYPES[name], backward),
        variants,
        flops=(3 if backward else 1) * 2.0 * LENGTH * HIDDEN * VOCAB,
        dtype=DTYPES[name],
    )
