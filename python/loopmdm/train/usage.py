"""How much of the machine a run uses: FLOPs a second, their share of the peak, memory."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

import torch

# Dense bf16 products with fp32 sums, in FLOP/s, by a part of the device's name (NVIDIA's data sheets).
_PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device in bf16, FLOP/s; None: not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the allocator on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):  # not on Linux
        # What getrusage says there is at least what the process held that started this one.
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return 1024 * int(found[1])
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
