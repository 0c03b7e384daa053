"""The machine's limits, measured in the run that needs them: peak matrix products and read bandwidth."""

from __future__ import annotations

import functools

import torch

from loopmdm_kernels.testing import interleaved_medians


@functools.cache
def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of several sizes."""
    best = 0.0
    for size in (768, 1024, 2048):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        seconds = interleaved_medians({"matmul": lambda a=a, b=b: a @ b}, repeats=9)["matmul"]
        best = max(best, 2 * size**3 / seconds)
    return best


@functools.cache
def read_bandwidth() -> float:
    """Bytes/s of reading 512 MB once."""
    data = torch.ones(128 * 2**20, dtype=torch.float32)
    return data.numel() * 4 / interleaved_medians({"read": data.sum}, repeats=9)["read"]


def bound_seconds(flops: float, bytes_read: float, dtype: torch.dtype) -> float:
    """The least time this machine can need: the larger of computing and reading."""
    return max(flops / peak_flops(dtype), bytes_read / read_bandwidth())
