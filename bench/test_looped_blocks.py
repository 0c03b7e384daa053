"""looped_blocks beside what users have today: plain PyTorch, eager and compiled, fp32 and bf16."""

from __future__ import annotations

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.testing import LoopedInputs, looped_inputs
from loopmdm_kernels.types import BlockWeights


def flops(inputs: LoopedInputs, num_loops: int) -> float:
    batch, length, hidden = inputs.x.shape
    width = inputs.blocks[0].mlp_in.shape[0]
    per_token = 2 * (4 * hidden**2 + 2 * hidden * width) + 4 * length * hidden
    return float(num_loops * len(inputs.blocks) * batch * length * per_token)


@pytest.mark.parametrize(
    ("batch", "length", "hidden", "heads"),
    [(1, 128, 768, 12), (1, 1024, 768, 12), (1, 81, 256, 4), (64, 81, 256, 4)],
    ids=["D768-T128", "D768-T1024", "D256-T81", "D256-B64xL81"],
)
def test_looped_blocks_forward(compare, batch, length, hidden, heads, num_loops=12):
    exact = looped_inputs(batch, length, hidden, heads, 2)
    variants = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        inputs = exact.to(dtype)

        def one_loop(x, blocks, modulation, inputs=inputs):
            return reference.looped_blocks(x, blocks, modulation, 1, num_heads=heads, rotary=inputs.rotary)

        def run(loop, inputs=inputs):
            x = inputs.x
            for _ in range(num_loops):
                x = loop(x, inputs.blocks, inputs.modulation)
            return x

        compiled = torch.compile(one_loop)
        variants[f"eager {name}"] = lambda run=run, loop=one_loop: run(loop)
        variants[f"compiled {name}"] = lambda run=run, loop=compiled: run(loop)
    inputs = exact.to(torch.bfloat16)
    weight_bytes = sum(w.numel() * w.element_size() for b in inputs.blocks for w in BlockWeights(*b))
    with torch.no_grad():
        compare(
            lambda: lk.looped_blocks(
                inputs.x, inputs.blocks, inputs.modulation, num_loops, num_heads=heads, rotary=inputs.rotary
            ),
            variants,
            flops=flops(inputs, num_loops),
            bytes_read=weight_bytes,
            dtype=torch.bfloat16,
            repeats=7,
        )
