"""How an implementation's error grows over the loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from loopmdm_kernels.testing import reference
from loopmdm_kernels.testing.generators import LoopedInputs
from loopmdm_kernels.testing.tolerance import max_error, rounding_step

LoopedBlocks = Callable[..., Tensor]


def error_over_loops(
    implementation: LoopedBlocks,
    inputs: LoopedInputs,
    dtype: torch.dtype,
    loops: Iterable[int] = range(1, 25),
) -> list[tuple[int, float, float, float]]:
    """(S, error, error of plain PyTorch in `dtype`, one rounding step) against float64, for each S."""
    exact, rounded = inputs.to(torch.float64), inputs.to(dtype)
    curve = []
    with torch.no_grad():
        for num_loops in loops:
            oracle = _run(reference.looped_blocks, exact, num_loops)
            error = max_error(_run(implementation, rounded, num_loops), oracle)
            baseline = max_error(_run(reference.looped_blocks, rounded, num_loops), oracle)
            curve.append((num_loops, error, baseline, rounding_step(oracle, dtype)))
    return curve


def _run(implementation: Callable[..., object], inputs: LoopedInputs, num_loops: int) -> Tensor:
    out = implementation(
        inputs.x,
        inputs.blocks,
        inputs.modulation,
        num_loops,
        num_heads=inputs.num_heads,
        rotary=inputs.rotary,
        key_mask=inputs.key_mask,
    )
    assert isinstance(out, Tensor)
    return out
