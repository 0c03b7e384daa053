"""A stand-in for CUDA graphs that needs no GPU, for `loopmdm_kernels.graphs.captured_by`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loopmdm_kernels import backends
from loopmdm_kernels.calls import Call

_BY_LAUNCHES = ("loopmdm_kernels.triton", "loopmdm_kernels.cuda")  # modules of backends
_capturing: ContextVar[_Recorder | None] = ContextVar("loopmdm_recorder", default=None)


class RecordedGraphs:
    """Writes down what a call does and does that again at replay; Python is not looked at a second time.

    As with a CUDA graph, tensors keep their addresses and numbers their values, and reading a tensor during
    the capture raises. What the call left in memory that it made is lost before the next replay, since graphs
    share a pool. An op of this package is one entry, or one for each launch where it is Triton's or CUDA's.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, call: Callable[[], None]) -> Callable[[], object]:
        self.captures += 1
        recorder = _Recorder()
        with recorder.recording_kernels(), recorder:
            call()
        recorder.spoil()

        def replay() -> None:
            self.replays += 1
            recorder.spoil()
            with torch.autocast("cpu", enabled=False):  # casts were written down
                recorder.replay()

        return replay


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The calls of a capture, each with the tensors that it made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Callable[[], Any], list[Tensor | None]]] = []
        self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch._dynamo is imported, which takes seconds; nothing is compiled here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if _waits(func, args):
            raise RuntimeError(
                f"{func} reads a tensor on the host, which a stream that is captured cannot do"
            )
        return self.record(lambda: func(*args, **kwargs), (args, kwargs))

    def record(self, call: Callable[[], Any], arguments: Any) -> Any:
        """What call() returns; at replay, memory that is not of `arguments` is filled in place."""
        out = call()
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(arguments) if isinstance(t, Tensor)}
        made = [
            t if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given else None
            for t in tree_leaves(out)
        ]
        self._calls.append((call, made))
        return out

    def replay(self) -> None:
        for call, made in self._calls:
            for old, new in zip(made, tree_leaves(call()), strict=True):
                if old is not None:
                    old.copy_(new)

    def spoil(self) -> None:
        """Lose what was computed."""
        for _, made in self._calls:
            for tensor in made:
                if tensor is not None and tensor.dtype == torch.bool:
                    tensor.logical_not_()
                elif tensor is not None:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    @contextmanager
    def recording_kernels(self) -> Iterator[None]:
        """Inside, kernels that torch's dispatcher does not see are written down too."""
        choose = backends.choose

        def recorded(op: str, call: Call) -> Callable[[Call], Any]:
            run = choose(op, call)
            if run.__module__.startswith(_BY_LAUNCHES):
                return run
            return lambda call: self.record(lambda: self._hidden(lambda: run(call)), call.arguments())

        def on(device: torch.device, run: Callable[[], None]) -> None:
            on_device(run)

        with ExitStack() as patches:
            patches.enter_context(patch("loopmdm_kernels.ops.checks.can_read", lambda value: False))
            # Without this mode a call goes straight to its backend, whose own ops are then seen one by one.
            patches.enter_context(patch("loopmdm_kernels.ops.library.traced", lambda *tensors: False))
            patches.enter_context(patch("loopmdm_kernels.backends.choose", recorded))
            if "triton" in backends.forced():
                patches.enter_context(patch("loopmdm_kernels.triton.launch._on", on))
            token = _capturing.set(self)
            patches.callback(_capturing.reset, token)
            yield

    def _hidden(self, call: Callable[[], Any]) -> Any:
        """call(), of which the dispatcher writes nothing down."""
        self._paused, before = True, self._paused
        try:
            return call()
        finally:
            self._paused = before


def on_device(run: Callable[[], None]) -> None:
    """Does what stands in for a kernel, which the dispatcher does not see; a capture writes it down."""
    recorder = _capturing.get()
    if recorder is None:
        run()
    else:
        recorder.record(lambda: recorder._hidden(run), ())


def _waits(func: Any, arguments: Any) -> bool:
    """Whether the host would wait for a device to know the result, or its shape."""
    name = func.overloadpacket.__name__
    if name.startswith("index"):  # by numbers or by a mask
        return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(arguments))
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return name == "is_nonzero" or not tags.isdisjoint(func.tags)
