"""Packed weights follow parameters that were written to unnoticed: looped_blocks/refresh_weights.cuh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16384  # elements: 64 KB of fp32, of which a block reads 8 to compare
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the kernel counts them
_WORD = 4  # bytes, of two numbers of 16 bits


class Refresh(NamedTuple):
    """What is packed where, for one device."""

    chunks: Tensor  # int64 [chunks, 4], `Chunk` of the kernel
    fingerprints: Tensor  # int64 [chunks]; 0 is like no parameter, so the first time all is converted


def readable(source: Tensor) -> bool:
    """Whether the kernel can read these numbers, of which those of a row lie side by side."""
    pairs = (source.data_ptr(), *(stride * source.element_size() for stride in source.stride()[:-1]))
    return source.dtype in KINDS and source.stride(-1) == 1 and all(bytes % _WORD == 0 for bytes in pairs)


def refresh_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Refresh | None:
    """For pairs of a parameter and its packed copy; None if the kernel cannot read one of the parameters."""
    rows = []
    for source, target in pairs:
        if not readable(source) or not source.is_contiguous() or source.numel() % 2:
            return None
        kinds = KINDS[source.dtype] | (target.dtype == torch.float32) << 32
        for first in range(0, source.numel(), CHUNK):
            rows.append(
                (
                    source.data_ptr() + first * source.element_size(),
                    target.data_ptr() + first * target.element_size(),
                    min(CHUNK, source.numel() - first),
                    kinds,
                )
            )
    device = pairs[0][1].device
    return Refresh(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.zeros(len(rows), dtype=torch.int64, device=device),
    )
