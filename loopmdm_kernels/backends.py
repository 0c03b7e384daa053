"""Which implementations of the ops exist here, and which one a call uses.

An op goes to the first backend of `PREFERENCE` that has a kernel for it, works on the tensors' device and
supports the arguments; `reference` has every op. `use_backend` or the environment variable LOOPMDM_BACKEND
forces one instead, which then does the work or says why it cannot, or several in order ("cuda,triton"): a
call that goes past one of them says so, once. A LOOPMDM_CPU_ISA that this machine has not is an error of
every op that might have run on the CPU kernels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar, Token
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch

from loopmdm_kernels import reference
from loopmdm_kernels.tracing import transformed
from loopmdm_kernels.values import meant

_P = ParamSpec("_P")
_R = TypeVar("_R")

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
        "head_logits_backward": "loopmdm_kernels.cpu.head_logits",
        "looped_blocks": "loopmdm_kernels.cpu.looped_blocks",
        "masked_cross_entropy": "loopmdm_kernels.cpu.masked_cross_entropy",
        "sample_rows": "loopmdm_kernels.cpu.sample_rows",
    },
    "triton": {
        "attention": "loopmdm_kernels.triton.attention",
        "head_logits": "loopmdm_kernels.triton.head_logits",
        "head_logits_backward": "loopmdm_kernels.triton.head_logits",
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

_forced: ContextVar[tuple[str, ...]] = ContextVar("loopmdm_backend", default=())
_passed_over: set[tuple[str, str, str]] = set()  # op, backend, reason: what has been said


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


class use_backend:
    """Make the ops called inside, in this thread or task, use one backend.

    Of several, such as use_backend("cuda", "triton"), each call uses the first that can do it, and warns once
    for each reason to go past one. Names are checked by the call; the choice holds inside `with`, or as a
    decorator inside the function. Without either it does nothing, and says so in a RuntimeWarning.

    Raises:
        ValueError: no backend has such a name, or none is given.
        RuntimeError: none can be used on this machine; inside, an op that none can do raises this too.
    """

    def __init__(self, *names: str) -> None:
        self._used = True  # nothing to say of names that are refused
        _check_names("use_backend", names)
        reasons = {name: _why_unavailable(name) for name in names}
        if None not in reasons.values():
            raise RuntimeError("use_backend: " + _refusals("cannot be used here", reasons))
        self._names, self._tokens = names, list[Token[tuple[str, ...]]]()
        self._used = False

    def __enter__(self) -> None:
        self._used = True
        self._tokens.append(_forced.set(self._names))

    def __exit__(self, *error: object) -> None:
        _forced.reset(self._tokens.pop())

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        self._used = True

        @wraps(function)
        def inside(*args: _P.args, **options: _P.kwargs) -> _R:
            with use_backend(*self._names):
                return function(*args, **options)

        return inside

    def __del__(self) -> None:
        if not self._used:
            asked = ", ".join(map(repr, self._names))
            warnings.warn(
                f"use_backend({asked}): does nothing by itself, use `with use_backend({asked}): ...`",
                RuntimeWarning,
                stacklevel=2,
            )


def forced() -> tuple[str, ...]:
    """The backends that `use_backend` or LOOPMDM_BACKEND asks for, in order; () if it is left open."""
    asked = os.environ.get("LOOPMDM_BACKEND")
    return _forced.get() or (tuple(name.strip() for name in asked.split(",")) if asked else ())


def implementation(
    op: str, device: torch.device, *, fp8_weights: bool = False, **arguments: Any
) -> Callable[..., Any]:
    """The function that performs `op` on tensors of `device`.

    `fp8_weights`: matrices are e4m3, which the reference and some backends take. `arguments` are those of the
    op on which a kernel's support depends.
    """
    asked = forced()
    _check_names("LOOPMDM_BACKEND", asked or PREFERENCE)
    if "cpu" in (asked or PREFERENCE):
        _check_instruction_set()
    if asked:
        reasons: dict[str, str | None] = {}
        for name in asked:
            if name == "reference":
                reason = None
            else:
                reason = _why_unavailable(name) or _why_not(name, op, device, fp8_weights, arguments)
            if reason is None:
                for passed, why in reasons.items():
                    _say_once(op, passed, str(why), name)
                return _reference(op) if name == "reference" else _kernel(name, op)
            reasons[name] = reason
        raise RuntimeError(f"{op}: " + _refusals("was asked for and cannot do this", reasons))
    for name in PREFERENCE:
        if _why_not(name, op, device, fp8_weights, arguments) is None and _why_unavailable(name) is None:
            return _kernel(name, op)
    return _reference(op)


def _check_instruction_set() -> None:
    """Raises for a LOOPMDM_CPU_ISA that this machine has not: it was set to force something."""
    if os.environ.get("LOOPMDM_CPU_ISA"):
        try:
            extension = _extension()
        except ImportError:
            return
        try:
            extension.cpu_isa()
        except RuntimeError as error:
            raise ValueError(str(error)) from None


def _check_names(source: str, names: tuple[str, ...]) -> None:
    if not names:
        raise ValueError(f"{source}: got no backend, expected one of {', '.join(BACKENDS)}")
    for name in names:
        if name not in BACKENDS:
            close = meant(name, BACKENDS)
            raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}{close}")


def _refusals(what: str, reasons: dict[str, str | None]) -> str:
    return "; ".join(f"backend {name!r} {what}: {reason}" for name, reason in reasons.items())


def _say_once(op: str, passed: str, reason: str, name: str) -> None:
    if (op, passed, reason) not in _passed_over:
        _passed_over.add((op, passed, reason))
        warnings.warn(
            f"{op}: backend {passed!r} cannot do this ({reason}), {name!r} does; said once", stacklevel=4
        )


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
    if transformed():
        return "transforms of torch.func and forward-mode derivatives see plain PyTorch only"
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
