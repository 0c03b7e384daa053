"""Which implementations of the ops exist here, and which one a call uses.

An op goes to the first backend that says it can do the call, of those that a verdict of `qualify` found right
and faster on this machine, or without a verdict of `PREFERENCE`; `reference` can do every one. `use_backend`
or the environment variable LOOPMDM_BACKEND forces one instead, which then does the work or says why it
cannot, or several in order ("cuda,triton"): a call that goes past one of them says so, once. A
LOOPMDM_CPU_ISA that this machine has not is an error of every op that might have run on the CPU kernels.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch

from loopmdm_kernels import verdicts
from loopmdm_kernels.calls import Call
from loopmdm_kernels.tracing import transformed
from loopmdm_kernels.values import meant

_P = ParamSpec("_P")
_R = TypeVar("_R")
Used: TypeAlias = dict[str, dict[str, str]]  # for each op, backends and why

BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = ("cpu",)  # without a verdict; not triton and cuda: their kernels have not run on a device yet
_DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_WITH_FP8_WEIGHTS = ("triton",)

# The ops of each backend; `reference` has all. Its module of that name holds why_not(call), which says why
# it cannot do a call, or None, and run(call), which does it (run_backward for `head_logits_backward`).
_OPS = (
    "attention",
    "head_logits",
    "head_logits_backward",
    "looped_blocks",
    "masked_cross_entropy",
    "sample_rows",
)
_KERNELS = {
    "cpu": _OPS,
    "triton": _OPS,
    "cuda": ("head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows"),
}

_forced: ContextVar[tuple[str, ...]] = ContextVar("loopmdm_backend", default=())
_passed_over: set[tuple[str, str, str]] = set()  # op, backend, reason: what has been said
_used: ContextVar[Used | None] = ContextVar("loopmdm_used", default=None)
_unqualified: set[str] = set()  # devices of which has been said that there is no verdict


class Refused(RuntimeError):
    """No backend that was asked for can do a call."""


def available_backends(*, explain: bool = False) -> dict[str, bool | str]:
    """What is usable here: True, or the instruction set in use; for the others the reason why not.

    explain: a sentence for each instead, which also says when calls use it unasked, and why.
    """
    if explain:
        return {name: _explained(name) for name in BACKENDS}
    status: dict[str, bool | str] = {}
    for name in BACKENDS:
        reason = _why_unavailable(name)
        if reason is not None:
            status[name] = reason
        else:
            status[name] = _extension().cpu_isa() if name == "cpu" else True
    return status


def _explained(name: str) -> str:
    if name == "reference":
        return "used where no other backend is"
    device = _DEVICE_OF[name]
    reason = why_not_on(name, torch.device(device))
    if reason is not None:
        return f"not used: {reason}"
    if device == "cuda" and not torch.cuda.is_available():
        return "not used unless asked for (Triton's interpreter)"
    if verdicts.switched_off():
        why, orders = "LOOPMDM_QUALIFY=0", None
    else:
        orders, speedups, why = verdicts.standing(_current(device))
    if orders is None:
        return f"used ({why})" if name in PREFERENCE else f"not used unless asked for ({why})"
    won = [question for question, names in orders.items() if name in names]
    if not won:
        return f"not used unless asked for ({why}: nowhere right and faster than plain PyTorch)"
    rates = [speedups[question, name] for question in won]
    many = f"{min(rates):.2f} to {max(rates):.2f} times as fast as plain PyTorch"
    return f"used for {len(won)} of {len(orders)} kinds of calls ({why}: right, {many})"


def _current(device: str) -> torch.device:
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


@contextmanager
def recorded() -> Iterator[Used]:
    """Yields a dict of what calls inside, in this thread or task, use: for each op, backends and why."""
    used: Used = {}
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


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


def run(op: str, call: Call) -> Any:
    """What the first backend that can do the call makes of it.

    The same op gives answers of the same shape from every backend.
    """
    implementation, device = choose(op, call), call.first.device
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return implementation(call)
    with torch.autocast(device.type, enabled=False):
        return implementation(call)


def choose(op: str, call: Call) -> Callable[[Any], Any]:
    """The function of the backend that does the call."""
    asked = forced()
    order = asked or _preferred(op, call)
    if asked:
        _check_names("LOOPMDM_BACKEND", order)
    if "cpu" in order[1:]:  # or it is the first and asked below
        _check_instruction_set()
    reasons: dict[str, str] = {}
    for name in order:
        reason = _why_not(name, op, call)
        if reason is None:
            for passed, why in reasons.items() if asked else ():
                _say_once(op, passed, why, name)
            _note(op, call, name, reasons)
            return kernel(name, op)
        if name == "cpu":
            _check_instruction_set()
        reasons[name] = reason
    if asked:
        raise Refused(f"{op}: " + _refusals("was asked for and cannot do this", reasons))
    _note(op, call, "reference", reasons)
    return kernel("reference", op)


def _preferred(op: str, call: Call) -> tuple[str, ...]:
    """Of the backends that nobody has asked for, those to try."""
    device = call.first.device
    kind = device.type
    if kind not in ("cpu", "cuda"):
        return PREFERENCE
    found = verdicts.standing(device)
    if found.orders is None:
        if kind == "cuda":
            _say_unqualified(device, found.why)
        return PREFERENCE
    question = _question(op, call)
    order = found.orders.get(question)
    if order is None and kind == "cuda" and question[2] in verdicts.DTYPES:
        _say_unqualified(device, f"the {found.why} says nothing of {', '.join(question)}")
    # The environment is asked last: that takes longest. A forced instruction set asks for the kernels too.
    if order is None or order == PREFERENCE or verdicts.switched_off():
        return PREFERENCE
    return PREFERENCE if kind == "cpu" and os.environ.get("LOOPMDM_CPU_ISA") else order


def _question(op: str, call: Call) -> verdicts.Question:
    backward = op.endswith("_backward")
    direction = "gradients" if backward or call.trains else "forward"
    dtype = "fp8" if call.fp8 else _name_of(call.dtype)
    return op.removesuffix("_backward"), direction, dtype


@cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say_unqualified(device: torch.device, why: str) -> None:
    """Once a device: its kernels are there and are not used."""
    if str(device) in _unqualified or verdicts.switched_off():
        return
    _unqualified.add(str(device))
    if any(_why_unavailable(name) is None for name in ("triton", "cuda")):
        warnings.warn(
            f"{device}: plain PyTorch is used: {why}. `loopmdm qualify` finds out in a few minutes which"
            " kernels are right and faster here, and they are used from then on; said once",
            stacklevel=6,
        )


def _note(op: str, call: Call, name: str, reasons: Mapping[str, str]) -> None:
    """Write down for `recorded` what does a call."""
    used = _used.get()
    if used is None or name in used.setdefault(op, {}):
        return
    device = call.first.device
    passed = "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
    if forced():
        why = "forced"
    elif verdicts.switched_off() or device.type not in ("cpu", "cuda"):
        why = "without a verdict"
    else:
        found = verdicts.standing(device)
        speedup = found.speedups.get((_question(op, call), name))
        why = found.why
        if speedup is not None:
            why += f": right, {speedup:.2f} times as fast as plain PyTorch"
        elif name == "reference" and found.orders is not None and not passed:
            why += ": no backend is right and faster"
    used[op][name] = f"{why}; {passed}" if passed else why


def has_kernel(name: str, op: str) -> bool:
    """Whether a backend has an op at all."""
    return name == "reference" or op in _KERNELS[name]


def why_not_on(name: str, device: torch.device) -> str | None:
    """Why a backend can do nothing on a device, or None."""
    reason = _why_unavailable(name)
    wanted = _DEVICE_OF.get(name, device.type)
    if reason is None and wanted != device.type:
        return f"it is for a {wanted} device"
    return reason


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


def _refusals(what: str, reasons: Mapping[str, str | None]) -> str:
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


def _why_not(name: str, op: str, call: Call) -> str | None:
    if name == "reference":
        return None
    reason = _why_unavailable(name)
    if reason is not None:
        return reason
    if op not in _KERNELS.get(name, ()):  # or a verdict names what is no backend
        return f"it has no kernel for {op}"
    if transformed():
        return "transforms of torch.func and forward-mode derivatives see plain PyTorch only"
    if call.fp8 and name not in _WITH_FP8_WEIGHTS:
        return "it has no kernels for fp8 weights"
    wanted = "cpu" if name == "triton" and _interpreted() else _DEVICE_OF[name]
    if call.first.device.type != wanted:
        return f"its tensors must be on a {wanted} device, got {call.first.device}"
    why_not: str | None = _module(name, op).why_not(call)
    return why_not


def _extension() -> Any:
    return sys.modules.get("loopmdm_kernels._C") or import_module("loopmdm_kernels._C")


@cache
def _module(name: str, op: str) -> Any:
    return import_module(f"loopmdm_kernels.{name}.{op.removesuffix('_backward')}")


def kernel(name: str, op: str) -> Callable[[Any], Any]:
    """The function by which a backend does an op."""
    module = _module(name, op)
    function: Callable[[Any], Any] = module.run_backward if op.endswith("_backward") else module.run
    return function
