"""How kernels are launched: on the device of their tensors and torch's current stream.

Inside `recording` nothing runs: launches are written down with the processor they would be compiled for, so
that the tests can compile for devices that are not there. Tensors may then be on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret


class Processor(NamedTuple):
    """What tile sizes and grids depend on."""

    arch: int  # compute capability without the dot; 0: the interpreter
    multiprocessors: int


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    processor: Processor


_INTERPRETER = Processor(0, 2)  # two persistent programs: each has several tiles
_recording: ContextVar[tuple[Processor, list[Launch]] | None] = ContextVar("recording", default=None)


@contextmanager
def recording(processor: Processor) -> Iterator[list[Launch]]:
    """Collects the launches made inside, as they would be on `processor`, in place of running them."""
    launches: list[Launch] = []
    token = _recording.set((processor, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def processor(device: torch.device) -> Processor:
    """The processor that runs kernels on tensors of `device`."""
    recorded = _recording.get()
    if recorded is not None:
        return recorded[0]
    return _INTERPRETER if INTERPRETED else _processor(device)


@cache
def _processor(device: torch.device) -> Processor:
    properties = torch.cuda.get_device_properties(device)
    return Processor(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *tensors_and_sizes: Any,
    num_warps: int,
    num_stages: int,
    **options: Any,
) -> None:
    """kernel[grid](*tensors_and_sizes, **options) where its tensors are."""
    if not all(grid):
        return
    recorded = _recording.get()
    if recorded is not None:
        arguments = dict(zip(kernel.arg_names, tensors_and_sizes, strict=False)) | options
        how = {"num_warps": num_warps, "num_stages": num_stages}
        recorded[1].append(Launch(kernel, grid, arguments, how, recorded[0]))
        return

    def run() -> None:
        # Contraction into fused multiply-adds is asked for, not left to the version's default.
        kernel[grid](
            *tensors_and_sizes, **options, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True
        )

    device = next(t.device for t in tensors_and_sizes if isinstance(t, Tensor))
    _on(device, run)


def _on(device: torch.device, run: Callable[[], None]) -> None:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        run()
        return
    with torch.cuda.device(device):
        run()


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, 1 << (n - 1).bit_length())
