"""Device memory that is kept from call to call, for calls on any stream.

A graph that is being captured can wait for nothing outside itself: torch waits for the device before it
begins a capture, and the order of replays among other work is their caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Shared:
    """Tensors of one device that were made, or last written, on one stream and are read on others."""

    def __init__(self, *tensors: Tensor) -> None:
        """What has been done to them on the current stream so far is what others wait for."""
        self._tensors = tensors
        self._lock = threading.Lock()
        self._written: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        self._record(self._stream())

    def read(self) -> tuple[Tensor, ...]:
        """The tensors, as the current stream may read them from now on."""
        with self._lock:
            self._join(self._stream())
        return self._tensors

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, the current stream may write to the tensors, and afterwards read them."""
        with self._lock:
            stream = self._stream()
            self._join(stream)
            yield
            self._record(stream)

    def _stream(self) -> torch.cuda.Stream | None:
        """The current one; none on a CPU, and none that could wait while a graph is captured."""
        if not self._tensors[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream(self._tensors[0].device)

    def _join(self, stream: torch.cuda.Stream | None) -> None:
        if stream is None or self._written is None or stream == self._written[0]:
            return
        stream.wait_event(self._written[1])
        for tensor in self._tensors:
            tensor.record_stream(stream)  # memory is not given away while it reads

    def _record(self, stream: torch.cuda.Stream | None) -> None:
        if stream is not None:
            self._written = stream, stream.record_event(self._written[1] if self._written else None)
