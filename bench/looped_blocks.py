"""looped_blocks beside what users have today: plain PyTorch, eager and compiled, fp32 and bf16."""

from __future__ import annotations

import pytest
import torch

import loopmdm_kernels as lk
from bench.peers import compiled
from bench.roofline import NAMES
from loopmdm_kernels import reference
from loopmdm_kernels.testing import LoopedInputs, looped_inputs

NUM_LOOPS = 12


def flops(inputs: LoopedInputs) -> float:
    batch, length, hidden = inputs.x.shape
    width = inputs.blocks[0].mlp_in.shape[0]
    per_token = 2 * (4 * hidden**2 + 2 * hidden * width) + 4 * length * hidden
    return float(NUM_LOOPS * len(inputs.blocks) * batch * length * per_token)


def plain_variants(inputs, name, whole_graph):
    """Eager, with one loop as a graph, and with all loops as one."""

    def loops(x, blocks, modulation, num_loops):
        return reference.looped_blocks(
            x, blocks, modulation, num_loops, num_heads=inputs.num_heads, rotary=inputs.rotary
        )

    def all_loops():
        return loops(inputs.x, inputs.blocks, inputs.modulation, NUM_LOOPS)

    fast_loops = compiled(loops)

    def one_after_the_other():
        x = inputs.x
        for _ in range(NUM_LOOPS):
            x = fast_loops(x, inputs.blocks, inputs.modulation, 1)
        return x

    variants = {f"eager {name}": all_loops, f"compiled {name}": one_after_the_other}
    if whole_graph:
        variants[f"compiled whole {name}"] = lambda: fast_loops(
            inputs.x, inputs.blocks, inputs.modulation, NUM_LOOPS
        )
    return variants


@pytest.mark.parametrize(
    ("batch", "length", "hidden", "heads", "dtype"),
    [
        pytest.param(1, 1024, 768, 12, torch.bfloat16, id="D768-T1024-bf16"),
        pytest.param(1, 128, 768, 12, torch.bfloat16, id="D768-T128-bf16"),
        pytest.param(1, 81, 256, 4, torch.bfloat16, id="D256-T81-bf16"),
        pytest.param(64, 81, 256, 4, torch.bfloat16, id="D256-B64xL81-bf16"),
        pytest.param(1, 1024, 768, 12, torch.float32, id="D768-T1024-fp32"),
    ],
)
def test_looped_blocks(compare, batch, length, hidden, heads, dtype):
    exact = looped_inputs(batch, length, hidden, heads, 2)
    peers = {}
    for peer_dtype in {torch.float32, dtype}:
        # One graph of all loops takes half a minute to compile, and saves nothing on long sequences.
        whole_graph = length < 1024 and peer_dtype == torch.bfloat16
        peers |= plain_variants(exact.to(peer_dtype), NAMES[peer_dtype], whole_graph)
    inputs = exact.to(dtype)
    with torch.no_grad():
        compare(
            lambda: lk.looped_blocks(
                inputs.x, inputs.blocks, inputs.modulation, NUM_LOOPS, num_heads=heads, rotary=inputs.rotary
            ),
            peers,
            flops=flops(inputs),
            dtype=dtype,
        )
