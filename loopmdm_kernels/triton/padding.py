"""Whether a batch can be padded without changing the bits of its sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.triton.launch import processor, recording
from loopmdm_kernels.triton.looped_blocks import run
from loopmdm_kernels.types import BlockWeights


def launches(
    batch: int, length: int, weights: BlockWeights, num_heads: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Any, ...]]:
    """The launches of a block on so many sequences: kernels and what they are compiled for, but no sizes.

    Tiles may depend on the number of rows, and the order of sums depends on tiles.
    """

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta")

    hidden = weights.norm1.shape[0]
    with torch.no_grad(), recording(processor(device)) as recorded:
        x = torch.empty(batch, length, hidden, device="meta", dtype=torch.float32)
        modulation = torch.empty(1, 1, 6, hidden, device="meta", dtype=torch.float32)
        blocks = [BlockWeights(*map(meta, weights))]
        run(LoopedCall(x, blocks, modulation, 1, num_heads, compute_dtype=dtype, exit_threshold=0.0))
    return [
        (launch.kernel, launch.options, {name: v for name, v in launch.arguments.items() if name.isupper()})
        for launch in recorded
    ]
