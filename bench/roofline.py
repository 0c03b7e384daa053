"""The machine's limits, measured in the run that needs them."""

from __future__ import annotations

import functools
from typing import Any

import torch

from loopmdm_kernels import _C
from loopmdm_kernels.testing import interleaved_times

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_peaks = dict.fromkeys(NAMES.values(), 0.0)


def measure_peaks(attempts: int = 5) -> None:
    """Keep the best attempt of the whole run: whatever disturbs one only makes it slower."""
    for dtype, name in NAMES.items():
        for _ in range(attempts):
            rate = _C.cpu_peak_flops(dtype == torch.bfloat16, torch.get_num_threads(), 15.0)
            _peaks[name] = max(_peaks[name], rate)


def limits() -> dict[str, Any]:
    """FLOP/s and bytes/s of all threads together: the instructions' peak, torch's matrix product, reading."""
    measure_peaks()
    return {
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        **{f"peak_{name}": rate for name, rate in _peaks.items()},
        **{f"matmul_{name}": _matmul_rate(dtype) for dtype, name in NAMES.items()},
        "read_bandwidth": _read_bandwidth(),
    }


def _matmul_rate(dtype: torch.dtype) -> float:
    """Of a large square matrix product, the best of several sizes."""
    best = 0.0
    for size in (768, 1024, 2048):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / _fastest(functools.partial(torch.mm, a, b)))
    return best


def _read_bandwidth() -> float:
    """Of reading 512 MB once."""
    data = torch.ones(128 * 2**20, dtype=torch.float32)
    return data.numel() * 4 / _fastest(data.sum)


def _fastest(call: Any) -> float:
    return min(interleaved_times({"call": call}, repeats=9)["call"])
