"""sample_rows of the default backend against the sampling step of the reference, on the same rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import loopmdm_kernels as lk
from loopmdm_kernels.reference.head import norm_modulate
from loopmdm_kernels.testing import head_inputs, row_rng
from loopmdm_kernels.types import Head

HIDDEN, VOCAB = 768, 50258


def reference_step(
    hidden: torch.Tensor, head: Head, rows: torch.Tensor, noise_dtype: torch.dtype
) -> torch.Tensor:
    """MDLM's step on these rows: logits, log-softmax, exp, a race on uniforms, argmax."""
    shift, scale = head.modulation[0]
    h = norm_modulate(hidden.flatten(0, 1)[rows], head.norm, shift, scale).to(head.weight.dtype)
    logits = F.linear(h, head.weight, head.bias)
    logits[:, head.excluded_token] = -1e6
    probs = torch.log_softmax(logits.float(), -1).to(noise_dtype).exp()
    uniform = torch.rand(probs.shape, dtype=noise_dtype)
    return (probs / (1e-10 - (uniform + 1e-10).log())).argmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 16, 128, 512])
def test_sample_rows(compare, num_rows, dtype):
    hidden, head = head_inputs(1, 1024, HIDDEN, VOCAB, excluded_token=VOCAB - 1)
    hidden, head = hidden.float(), Head(*(t.to(dtype) for t in head[:4]), VOCAB - 1)
    rows = torch.arange(num_rows) * (1024 // num_rows)
    rng = row_rng(num_rows)
    compiled = torch.compile(reference_step)
    with torch.no_grad():
        compare(
            lambda: lk.sample_rows(hidden, head, rows, rng),
            {
                "eager, fp32 race": lambda: reference_step(hidden, head, rows, torch.float32),
                "eager, fp64 race": lambda: reference_step(hidden, head, rows, torch.float64),
                "compiled, fp32 race": lambda: compiled(hidden, head, rows, torch.float32),
            },
            flops=2.0 * num_rows * HIDDEN * VOCAB,
            bytes_read=head.weight.numel() * head.weight.element_size(),
            dtype=dtype,
        )
