"""attention, forward and backward, beside torch's scaled_dot_product_attention in both dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import loopmdm_kernels as lk


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim"),
    [(1, 12, 1024, 64), (1, 12, 256, 64), (128, 4, 81, 32)],
    ids=["12x1024x64", "12x256x64", "512x81x32"],
)
def test_attention(compare, batch, heads, length, head_dim, backward):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(batch, heads, length, head_dim, generator=generator) for _ in range(3)]

    def variant(function, dtype):
        tensors = [t.to(dtype).requires_grad_(backward) for t in exact]

        def run():
            out = function(*tensors)
            if backward:
                torch.autograd.grad(out, tensors, out.detach())

        return run

    forward = 4.0 * batch * heads * length**2 * head_dim
    compare(
        variant(lk.attention, torch.bfloat16),
        {
            "sdpa fp32": variant(F.scaled_dot_product_attention, torch.float32),
            "sdpa bf16": variant(F.scaled_dot_product_attention, torch.bfloat16),
        },
        flops=forward * (3 if backward else 1),
        dtype=torch.bfloat16,
    )
