"""looped_blocks beside what users have today: plain PyTorch, eager and compiled, fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench import peers
from bench.compare import WITH_BF16_PARAMETERS
from bench.peers import compilers
from bench.roofline import NAMES, native_dtype
from bench.run import BF16, DTYPES, Calls, gradients_of, in_fp8
from loopmdm_kernels.testing import LoopedInputs, looped_inputs

NUM_LOOPS = 12


def flops(inputs: LoopedInputs) -> float:
    batch, length, hidden = inputs.x.shape
    width = inputs.blocks[0].mlp_in.shape[0]
    per_token = 2 * (4 * hidden**2 + 2 * hidden * width) + 4 * length * hidden
    return float(NUM_LOOPS * len(inputs.blocks) * batch * length * per_token)


def applied(op: Callable[..., Any], inputs: LoopedInputs, num_loops: int, **options: Any) -> Tensor:
    out: Tensor = op(
        inputs.x,
        inputs.blocks,
        inputs.modulation,
        num_loops,
        num_heads=inputs.num_heads,
        rotary=inputs.rotary,
        **options,
    )
    return out


def plain(inputs: LoopedInputs, num_loops: int) -> Tensor:
    return applied(peers.looped_blocks, inputs, num_loops)


def one_by_one(inputs: LoopedInputs, num_loops: int, fast: Callable[..., Tensor]) -> Tensor:
    """One compiled graph of one loop, applied again and again: a graph of all takes minutes to compile."""
    state = inputs.x
    for _ in range(num_loops):
        state = fast(inputs._replace(x=state), 1)
    return state


def forward_calls(inputs: LoopedInputs, num_loops: int, compiled: Callable[..., Any]) -> Calls:
    return {
        "ours": partial(applied, lk.looped_blocks, inputs, num_loops),
        "eager": partial(plain, inputs, num_loops),
        "compiled": partial(one_by_one, inputs, num_loops, compiled(plain)),
    }


def training_calls(inputs: LoopedInputs, num_loops: int, compiled: Callable[..., Any]) -> Calls:
    results = {**forward_calls(inputs, num_loops, compiled)}
    del results["eager"]
    results["ours, recomputed"] = partial(applied, lk.looped_blocks, inputs, num_loops, recompute=True)
    leaves = list(inputs.leaves().values())
    return {name: gradients_of(result, leaves) for name, result in results.items()}


def fp8_calls(inputs: LoopedInputs, num_loops: int) -> Calls:
    """With weights in e4m3, beside the same in bf16."""
    return {
        "ours": partial(applied, lk.looped_blocks, in_fp8(inputs), num_loops, compute_dtype=BF16),
        "bf16 weights": partial(applied, lk.looped_blocks, inputs, num_loops),
    }


SHAPES = {  # B, L, D, H
    "D768-T1024": (1, 1024, 768, 12),
    "D768-T128": (1, 128, 768, 12),
    "D256-T81": (1, 81, 256, 4),
    "D256-B64xL81": (64, 81, 256, 4),
}


def kinds_of_peers(dtype: torch.dtype) -> Iterable[torch.dtype]:
    """All, but fp32 alone for what is computed in fp32 where bf16 would be faster."""
    return (dtype,) if dtype == torch.float32 != native_dtype() else DTYPES.values()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_looped_blocks(compare, shape, dtype):
    batch, length, hidden, heads = SHAPES[shape]
    native = native_dtype()
    if dtype != native and (native == torch.float32 or shape != "D768-T1024"):
        pytest.skip("timed in the dtype of the fastest product; bf16 parameters beside it where that is fp32")
    exact = looped_inputs(batch, length, hidden, heads, 2)
    peers, ours = {}, {}
    for kind in kinds_of_peers(dtype):
        inputs, name = exact.to(kind), NAMES[kind]
        ours[kind] = partial(applied, lk.looped_blocks, inputs, NUM_LOOPS)
        peers[f"eager {name}"] = partial(plain, inputs, NUM_LOOPS)
        for way, compile_ in compilers().items():
            peers[f"{way} {name}"] = partial(one_by_one, inputs, NUM_LOOPS, compile_(plain))
            # One graph of all loops takes half a minute to compile, and saves nothing on long sequences.
            if length < 1024 and kind == native:
                peers[f"{way} whole {name}"] = partial(compile_(plain), inputs, NUM_LOOPS)
    if native == torch.float32:
        peers[WITH_BF16_PARAMETERS] = ours[torch.bfloat16]
    with torch.no_grad():
        compare(ours[dtype], peers, flops=flops(exact), dtype=dtype)
