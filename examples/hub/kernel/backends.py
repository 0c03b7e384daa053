"""The one backend of this kernel: Triton does a call or says why it cannot."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch

from .calls import Call
from .tracing import transformed


def run(op: str, call: Call) -> Any:
    """What the Triton kernels make of a call.

    Raises:
        RuntimeError: they cannot do it; the message says why.
    """
    module = import_module(f".triton.{op.removesuffix('_backward')}", __package__)
    reason = _why_not(call) or module.why_not(call)
    if reason is not None:
        raise RuntimeError(f"{op}: {reason}")
    function = module.run_backward if op.endswith("_backward") else module.run
    device = call.first.device
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return function(call)
    with torch.autocast(device.type, enabled=False):
        return function(call)


def _why_not(call: Call) -> str | None:
    if transformed():
        return "transforms of torch.func and forward-mode derivatives are not for these kernels"
    device = call.first.device
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"its tensors must be on a {'CPU' if interpreted else 'CUDA'} device, got {device}"
    if not interpreted and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return None
