"""Whether a backend is right on this device: values, gradients, and the same bits however it is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels import graphs
from loopmdm_kernels.backends import Refused
from loopmdm_kernels.qualification.cases import DOUBLE, Case, Results, cases

SAME_CALLS = 50
_ON_STREAMS = 10  # calls on each of two streams at once
_REPLAYS = 3


def usual_call(backend: str, op: str, direction: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Of the usual call alone, made once: how it differs from float64, or None.

    Raises:
        Refused: the backend does not do this.
    """
    case = next(cases(op, direction, dtype, device))
    with lk.use_backend(backend):
        call = case.prepare(dtype)
        with poisoned():
            out = call()
    try:
        _judge(case, out, dtype)
    except AssertionError as error:
        return f"{case.name}: {error}"
    return None


def check(backend: str, op: str, direction: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """right: True, False, or None where the backend does not do this; why; and what was checked.

    An error of the backend is raised: it may have left the device unusable.
    """
    passed: list[str] = []
    refused: list[str] = []
    finding: dict[str, Any] = {"right": None, "why": None, "checked": passed, "refused": refused}
    name = ""
    for index, case in enumerate(cases(op, direction, dtype, device)):
        name = case.name
        try:
            with lk.use_backend(backend):
                call = case.prepare(dtype)
                with poisoned():
                    out = call()
        except Refused as error:
            reason = str(error).rpartition("cannot do this: ")[2]
            refused.append(f"{name}: {reason}")
            if index == 0:
                return finding | {"why": reason}
            continue
        try:
            _judge(case, out, dtype)
            passed.append(name)
            if index == 0:
                passed += _same_bits(backend, call, out, device, captured=direction == "forward")
            elif case.same_bits:
                _same(call_on(backend, call), out, "the same call again")
        except AssertionError as error:
            return finding | {"right": False, "why": f"{name}: {error}"}
    return finding | {"right": True}


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that is not written yet holds NaN, or the largest number."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def call_on(backend: str, call: Callable[[], Results]) -> Results:
    with lk.use_backend(backend):
        return call()


def _judge(case: Case, out: Results, dtype: torch.dtype) -> None:
    with lk.use_backend("reference"):
        plain, exact = case.prepare(dtype)(), case.prepare(DOUBLE)()
    case.judge(out, plain, exact)


def _same_bits(
    backend: str, call: Callable[[], Results], out: Results, device: torch.device, *, captured: bool
) -> list[str]:
    """What was checked beyond the values of the first call."""
    for _ in range(SAME_CALLS - 1):
        _same(call_on(backend, call), out, "the same call again")
    passed = [f"{SAME_CALLS} times the same bits"]
    _same(_in_thread(lambda: call_on(backend, call)), out, "a fresh thread")
    passed.append("a fresh thread")
    if device.type == "cuda":
        _on_two_streams(backend, call, out, device)
        passed.append("two streams")
    if captured:
        with lk.use_backend(backend):
            reason = graphs.why_not(device)
            if reason is None:
                _replayed(call, out, device)
        passed.append("a CUDA graph" if reason is None else f"no CUDA graph: {reason}")
    return passed


def _same(results: Results, first: Results, what: str) -> None:
    for name, value in results.items():
        if not torch.equal(_bits(value), _bits(first[name])):
            raise AssertionError(f"{what}: {name} has other bits")


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def _in_thread(call: Callable[[], Results]) -> Results:
    found: list[Results | BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _on_two_streams(backend: str, call: Callable[[], Results], out: Results, device: torch.device) -> None:
    streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    results = []
    for _ in range(_ON_STREAMS):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call_on(backend, call))
    torch.cuda.synchronize(device)
    for result in results:
        _same(result, out, "two streams at once")


def _replayed(call: Callable[[], Results], out: Results, device: torch.device) -> None:
    kept: Results = {}

    def captured() -> None:
        kept.update(call())

    replay = graphs.capture_on(device)(captured)
    for _ in range(_REPLAYS):
        for value in kept.values():
            value.fill_(torch.nan if value.is_floating_point() else -1)
        replay()
        _same(kept, out, "a replayed CUDA graph")
