"""CUDA graphs of calls of the ops: what captures one, where that works, and how batches are padded for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from loopmdm_kernels import backends
from loopmdm_kernels.types import BlockWeights

# Given a call, makes what does it again: same kernels, same addresses, same Python values.
Capture = Callable[[Callable[[], None]], Callable[[], object]]

_CAPTURED = ("cuda", "triton")  # backends whose calls wait for nothing
_stand_in: ContextVar[Capture | None] = ContextVar("loopmdm_capture", default=None)
_read: ContextVar[list[Any] | None] = ContextVar("loopmdm_read_by_capture", default=None)


class CudaGraphs:
    """Captures calls on one device. The graphs share a memory pool, so no two may be replayed at a time.

    A call must have run before it is captured: kernels are compiled and loaded then, and what is kept for
    later calls must not come to lie in the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # captures of one share memory

    def __call__(self, call: Callable[[], None]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as those of a data loader, may allocate meanwhile.
        with (
            keeping() as read,
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            call()
        return partial(_replay, graph, read)


def _replay(graph: torch.cuda.CUDAGraph, read: list[Any]) -> None:
    """`read` lives as long as the graph that reads it."""
    graph.replay()


@contextmanager
def keeping() -> Iterator[list[Any]]:
    """Yields what calls inside say that a graph of them would read again: it must outlive the graph."""
    read: list[Any] = []
    token = _read.set(read)
    try:
        yield read
    finally:
        _read.reset(token)


def kept() -> list[Any] | None:
    """Where the capture that goes on keeps what its graph reads; None: it is not one of `CudaGraphs`."""
    return _read.get()


@contextmanager
def captured_by(stand_in: Capture) -> Iterator[None]:
    """Inside, `stand_in` takes the place of CUDA graphs, on any device: for tests."""
    token = _stand_in.set(stand_in)
    try:
        yield
    finally:
        _stand_in.reset(token)


def capture_on(device: torch.device) -> Capture:
    return _stand_in.get() or CudaGraphs(device)


def why_not(device: torch.device) -> str | None:
    """Why calls of the ops on tensors of `device` cannot be captured, or None."""
    if _stand_in.get() is not None:
        return None
    if device.type != "cuda":
        return f"they need a CUDA device, and the model is on {device}"
    forced = backends.forced()
    if not forced or not set(forced) <= set(_CAPTURED):
        return f"only the backends {' and '.join(_CAPTURED)} can be captured (use_backend, LOOPMDM_BACKEND)"
    return None


def bucket(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most half more than count, and few sizes in all."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def padded_batch(
    batch: int,
    most: int,
    length: int,
    weights: BlockWeights,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """The batch size, at most `most`, to which looped_blocks is padded; the sequences keep their bits.

    A bucket ends where the Triton kernels would take other tiles, and so sum in another order.
    """
    largest = min(bucket(batch), most)
    if "triton" not in backends.forced():
        return largest
    from loopmdm_kernels.triton.padding import launches

    def launched(size: int) -> list[Any]:
        return launches(size, length, weights, num_heads, dtype, device)

    wanted = launched(batch)
    return next(size for size in range(largest, batch - 1, -1) if launched(size) == wanted)
