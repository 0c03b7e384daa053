"""Which implementations of the ops exist here, and which one a call uses.

An op goes to the first backend of `PREFERENCE` that has a kernel for it, works on the tensors' device and
supports the arguments; `reference` has every op. `use_backend` or the environment variable LOOPMDM_BACKEND
forces one instead: it then does the work or says why it cannot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from loopmdm_kernels import reference

BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = ("cpu",)  # not triton and cuda: their kernels have not run on a device yet
_DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_WITH_FP8_WEIGHTS = ("triton",)

# The ops of each backend. A kernel module holds a function named like the op, and
# supports(**arguments) -> str | None: why it cannot take these arguments, or None.
_KERNEL_MODULES = {
    "cpu": {
        "attention": "loopmdm_kernels.cpu.attention",
        "head_logits": "loopmdm_kernels.cpu.head_logits",
        "looped_blocks": "loopmdm_kernels.cpu.looped_blocks",
        "masked_cross_entropy": "loopmdm_kernels.cpu.masked_cross_entropy",
        "sample_rows": "loopmdm_kernels.cpu.sample_rows",
    },
    "triton": {
        "attention": "loopmdm_kernels.triton.attention",
        "head_logits": "loopmdm_kernels.triton.head_logits",
        "looped_blocks": "loopmdm_kernels.triton.looped_blocks",
        "masked_cross_entropy": "loopmdm_kernels.triton.masked_cross_entropy",
        "sample_rows": "loopmdm_kernels.triton.sample_rows",
    },
    "cuda": {
        "head_logits": "loopmdm_kernels.cuda.head_logits",
        "looped_blocks": "loopmdm_kernels.cuda.looped_blocks",
        "masked_cross_entropy": "loopmdm_kernels.cuda.masked_cross_entropy",
        "sample_rows": "loopmdm_kernels.cuda.sample_rows",
    },
}

_forced: ContextVar[str | None] = ContextVar("loopmdm_backend", default=None)


def available_backends() -> dict[str, bool | str]:
    """What is usable here: True, or the instruction set in use; for the others the reason why not."""
    status: dict[str, bool | str] = {}
    for name in BACKENDS:
        reason = _why_unavailable(name)
        if reason is not None:
            status[name] = reason
        else:
            status[name] = _extension().cpu_isa() if name == "cpu" else True
    return status


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make the ops called inside, in this thread or task, use one backend.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: it cannot be used on this machine; inside, an op it cannot do raises this too.
    """
    _check_name("use_backend", name)
    reason = _why_unavailable(name)
    if reason is not None:
        raise RuntimeError(f"use_backend: backend {name!r} cannot be used here: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that `use_backend` or LOOPMDM_BACKEND asks for."""
    return _forced.get() or os.environ.get("LOOPMDM_BACKEND") or None


def implementation(
    op: str, device: torch.device, *, fp8_weights: bool = False, **arguments: Any
) -> Callable[..., Any]:
    """The function that performs `op` on tensors of `device`.

    `fp8_weights`: matrices are e4m3, which the reference and some backends take. `arguments` are those of the
    op on which a kernel's support depends.
    """
    asked = forced()
    if asked is not None:
        _check_name("LOOPMDM_BACKEND", asked)
        if asked == "reference":
            return _reference(op)
        reason = _why_unavailable(asked) or _why_not(asked, op, device, fp8_weights, arguments)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {asked!r} was asked for and cannot do this: {reason}")
        return _kernel(asked, op)
    for name in PREFERENCE:
        if _why_not(name, op, device, fp8_weights, arguments) is None and _why_unavailable(name) is None:
            return _kernel(name, op)
    return _reference(op)


def _check_name(source: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")


def _why_unavailable(name: str) -> str | None:
    if name == "cpu":
        try:
            _extension().cpu_isa()
        except ImportError as error:
            return f"the extension is not built: {error}"
        except RuntimeError as error:
            return str(error)
    elif name == "triton":
        return _why_no_triton()
    elif name == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        reason: str | None = import_module("loopmdm_kernels.cuda.driver").why_unavailable(capability)
        return reason
    return None


def _interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, as tests ask it to."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _why_no_triton() -> str | None:
    if not (torch.cuda.is_available() or _interpreted()):
        return "no GPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not _interpreted() and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"needs a GPU of compute capability 8.0 or later, got {major}.{minor}"
    return None


def _why_not(
    name: str, op: str, device: torch.device, fp8_weights: bool, arguments: dict[str, Any]
) -> str | None:
    if op not in _KERNEL_MODULES[name]:
        return f"it has no kernel for {op}"
    if fp8_weights and name not in _WITH_FP8_WEIGHTS:
        return "it has no kernels for fp8 weights"
    wanted = "cpu" if name == "triton" and _interpreted() else _DEVICE_OF[name]
    if device.type != wanted:
        return f"its tensors must be on a {wanted} device, got {device}"
    reason: str | None = _kernel_module(name, op).supports(**arguments)
    return reason


def _extension() -> Any:
    return import_module("loopmdm_kernels._C")


@cache
def _kernel_module(name: str, op: str) -> Any:
    return import_module(_KERNEL_MODULES[name][op])


def _kernel(name: str, op: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_kernel_module(name, op), op)
    return function


def _reference(op: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(reference, op)
    return function
