"""Peak memory of one forward and backward pass of masked_cross_entropy, in a process of its own.

python -m bench.peak_memory bf16|fp32 prints JSON: the bytes of the weight, and by how much the resident
memory rose at its highest. Linux only.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from bench.masked_cross_entropy import inputs, loss_and_gradients


def resident_bytes(field: str) -> int:
    """VmRSS: now; VmHWM: at its highest."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status: no line {field}")
    return 1024 * int(match[1])


def measure(dtype: torch.dtype) -> dict[str, int]:
    loss_and_gradients(inputs(dtype, vocab_size=100))()  # libraries and threads are there now
    arguments = inputs(dtype)
    run = loss_and_gradients(arguments)
    before = resident_bytes("VmRSS")
    gradients = run()
    rise = resident_bytes("VmHWM") - before
    weight = arguments.head.weight
    assert any(gradient.shape == weight.shape for gradient in gradients)
    return {"weight_bytes": weight.numel() * weight.element_size(), "rise_bytes": rise}


if __name__ == "__main__":
    print(json.dumps(measure({"bf16": torch.bfloat16, "fp32": torch.float32}[sys.argv[1]])))
