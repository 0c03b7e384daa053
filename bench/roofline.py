"""The machine's limits, measured in the run that needs them."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from loopmdm_kernels import _C
from loopmdm_kernels.testing import interleaved_times

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# What makes this package, torch, oneDNN and MKL compute as on a lesser processor.
LIMITING = ("LOOPMDM_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
CRAWLS = 3.0  # torch in bf16 is left out where its product is so many times slower than that of fp32
LONG = 0.2  # seconds of a product after which no larger one is timed
_peaks = dict.fromkeys(NAMES.values(), 0.0)


def multiplies_bf16(isa: str) -> bool:
    """Whether the instruction set has a product of bf16; elsewhere fp32 is the dtype to be fast in."""
    return isa.endswith("bf16")


def native_dtype() -> torch.dtype:
    return torch.bfloat16 if multiplies_bf16(_C.cpu_isa()) else torch.float32


def limiting_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in LIMITING if os.environ.get(name)}


def unequal_limits() -> str | None:
    """Why a comparison would be unfair: only one side computes as on a lesser processor. None: it is fair."""
    ours, theirs = _C.cpu_isa(), torch.backends.cpu.get_cpu_capability()
    if os.environ.get("LOOPMDM_CPU_ISA") and (ours == "avx2") != (theirs == "AVX2"):
        return f"the kernels use {ours} and torch {theirs}; `make bench ISA=avx2` limits all libraries"
    return None


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
        "processor_isa": _C.usable_cpu_isas().split(", ")[-1],
        "limiting_variables": limiting_variables(),
        "threads": torch.get_num_threads(),
        **{f"peak_{name}": rate for name, rate in _peaks.items()},
        **{f"matmul_{name}": _matmul_rate(dtype) for dtype, name in NAMES.items()},
        "read_bandwidth": _read_bandwidth(),
    }


@functools.cache
def crawls() -> float | None:
    """FLOP/s of torch's product of bf16 where its product of fp32 is several times faster, else None."""
    bf16, fp32 = (_matmul_rate(dtype, sizes=(512,)) for dtype in (torch.bfloat16, torch.float32))
    return bf16 if CRAWLS * bf16 < fp32 else None


def _matmul_rate(dtype: torch.dtype, sizes: tuple[int, ...] = (768, 1024, 2048)) -> float:
    """Of a large square matrix product, the best of several sizes; of fewer where one takes long."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        seconds = _fastest(functools.partial(torch.mm, a, b))
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG:
            break
    return best


def _read_bandwidth() -> float:
    """Of reading 512 MB once."""
    data = torch.ones(128 * 2**20, dtype=torch.float32)
    return data.numel() * 4 / _fastest(data.sum)


def _fastest(call: Any) -> float:
    """Of ten calls, or of as many as one second has room for."""
    first = interleaved_times({"call": call}, repeats=1, warmup=0)["call"][0]
    more = interleaved_times({"call": call}, repeats=min(9, int(1 / first)), warmup=0)["call"]
    return min([first, *more])
