"""Network calls as CUDA graphs: one graph is a whole call, from token ids to the drawn tokens.

What differs from step to step lies in buffers whose addresses do not change; batch and rows are padded to a
few sizes, so that a run needs few graphs. See docs/kernels.md.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm import diffusion
from loopmdm.exits import loop_to_threshold
from loopmdm.model import LoopMDM
from loopmdm.modules import DDiTBlock
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm.sampling.network import Draw, Network, Prediction, Spent
from loopmdm_kernels import graphs
from loopmdm_kernels.types import RowRng, SampledRows

MAX_GRAPHS = 32
_ROWS = 64  # rows are padded to multiples of it: what the vocabulary kernels take at once
_ALIGNMENT = 16  # elements; kernels are compiled for pointers that are multiples of 16 bytes


def check_graphs(models: Iterable[Any], plan: ComputePlan, draw: Draw) -> None:
    """Raise ValueError where the calls of a run cannot be captured."""
    for model in models:
        reason = graphs.why_not(model.device)
        if reason is not None:
            raise ValueError(f"cuda_graphs: {reason}")
        if not isinstance(model, LoopMDM):
            raise ValueError(f"cuda_graphs: it takes a LoopMDM, got {type(model).__name__}")
    for compute in plan.computes:
        if compute.exit is not None and compute.exit.threshold is None:
            raise ValueError(f"cuda_graphs: the exit rule {compute.exit} decides on the host after each loop")
    for name, value, plain in (("top_p", draw.top_p, 1), ("top_k", draw.top_k, None)):
        if value != plain:
            raise ValueError(f"cuda_graphs: {name} does not go with it, its draw waits for the device")


class Replays:
    """Runs calls by key: as they are at first, captured at the second time, replayed from then on.

    A graph that would be used once is not made, and a first run compiles kernels and fills caches, which a
    capture must not. Only the `limit` keys used last are kept.
    """

    def __init__(self, capture: graphs.Capture, limit: int) -> None:
        self._capture = capture
        self._limit = limit
        self._replays: OrderedDict[Hashable, Callable[[], object] | None] = OrderedDict()

    def run(self, key: Hashable, call: Callable[[], None]) -> None:
        if key not in self._replays:
            call()
            self._replays[key] = None
        else:
            replay = self._replays[key]
            if replay is None:
                replay = self._replays[key] = self._capture(call)
            replay()
        self._replays.move_to_end(key)
        if len(self._replays) > self._limit:
            self._replays.popitem(last=False)


class Inputs(NamedTuple):
    """What a step gives to a graph, padded; views of one buffer."""

    tokens: Tensor  # [B, L] int64
    rows: Tensor  # [R] int64, as the three names
    sequence: Tensor
    step: Tensor
    position: Tensor
    limits: Tensor  # [B] int64, loops at most
    sigma: Tensor  # [B] float64

    def fill(
        self,
        tokens: Tensor,
        rows: Tensor,
        names: tuple[Tensor, Tensor, Tensor],
        limits: int | Tensor,
        padding_limit: int,
        sigma: Tensor | None,
    ) -> None:
        """Write b sequences and r rows; what is padded computes something and is thrown away."""
        batch = len(tokens)
        for field, value in zip(self[:5], (tokens, rows, *names), strict=True):
            field[: len(value)] = value
            field[len(value) :] = 0
        self.limits[:batch] = limits
        self.limits[batch:] = padding_limit
        self.sigma.zero_()
        if sigma is not None:
            self.sigma[:batch] = sigma


class Outputs(NamedTuple):
    """What a graph leaves behind; views of one buffer. float64 holds ids, counts and fp32 exactly."""

    sampled: Tensor  # [6, R] float64: the fields of SampledRows
    loops: Tensor  # [B] float64


class Layout(NamedTuple):
    """The padded sizes of a call, and where its inputs and outputs lie in buffers of 8-byte elements."""

    batch: int
    width: int
    rows: int

    @property
    def input_sizes(self) -> list[int]:
        return [self.batch * self.width, *[self.rows] * 4, self.batch, self.batch]

    @property
    def output_sizes(self) -> list[int]:
        return [len(SampledRows._fields) * self.rows, self.batch]

    def inputs(self, buffer: Tensor) -> Inputs:
        """Views of an int64 buffer."""
        tokens, rows, sequence, step, position, limits, sigma = _views(buffer, self.input_sizes)
        tokens = tokens.view(self.batch, self.width)
        return Inputs(tokens, rows, sequence, step, position, limits, sigma.view(torch.float64))

    def outputs(self, buffer: Tensor) -> Outputs:
        """Views of a float64 buffer."""
        sampled, loops = _views(buffer, self.output_sizes)
        return Outputs(sampled.view(-1, self.rows), loops)


class GraphNetwork(Network):
    """The network calls of one run as CUDA graphs. They end with the run, so weights may change between runs.

    Beside a graph, a step is one copy to the device and one back, which waits for the result.
    """

    def __init__(
        self, model: LoopMDM, draw: Draw, *, needs_times: bool, max_batch: int, context: int
    ) -> None:
        super().__init__(model, draw, needs_times=needs_times)
        self._max_batch = max_batch
        self._replays = Replays(graphs.capture_on(model.device), MAX_GRAPHS)
        self._batches: dict[tuple[Any, int, int], int] = {}
        largest = Layout(max_batch, context, _padded_rows(max_batch * context))
        pinned = model.device.type == "cuda"
        inputs, outputs = _end(largest.input_sizes), _end(largest.output_sizes)
        self._host_inputs = torch.zeros(inputs, dtype=torch.int64, pin_memory=pinned)
        self._host_outputs = torch.zeros(outputs, dtype=torch.float64, pin_memory=pinned)
        self._inputs = torch.zeros(inputs, dtype=torch.int64, device=model.device)
        self._outputs = torch.zeros(outputs, dtype=torch.float64, device=model.device)

    @torch.inference_mode()
    def predict(
        self,
        tokens: Tensor,
        times: Tensor | None,
        compute: StepCompute,
        num_loops: int | Tensor,
        rows: Tensor,
        names: tuple[Tensor, Tensor, Tensor],
    ) -> Prediction:
        model = cast(LoopMDM, self.model_of(compute))
        sigma = None
        if model.config.time_conditioning:
            assert times is not None
            sigma = diffusion.sigma(times).float()
        batch, width = tokens.shape
        layout = Layout(self._padded_batch(model, batch, width), width, _padded_rows(len(rows)))
        layout.inputs(self._host_inputs).fill(tokens, rows, names, num_loops, compute.min_loops, sigma)
        used = _end(layout.input_sizes)
        self._inputs[:used].copy_(self._host_inputs[:used], non_blocking=True)

        alike = not isinstance(num_loops, Tensor)
        most = num_loops if isinstance(num_loops, int) else graphs.bucket(int(num_loops.max()))
        key = (compute._replace(num_loops=most), alike, layout)
        self._replays.run(key, partial(self._compute, compute, most, alike, layout))

        used = _end(layout.output_sizes)
        self._host_outputs[:used].copy_(self._outputs[:used])
        sampled, loops = layout.outputs(self._host_outputs)
        limits = num_loops if isinstance(num_loops, Tensor) else torch.full((batch,), num_loops)
        if compute.exit is None:
            spent = Spent(limits, None)
        else:
            taken = loops[:batch].long()
            spent = Spent(taken, compute.exit.cost(taken, limits, compute.min_loops))
        return Prediction(_sampled(sampled[:, : len(rows)]) if len(rows) else None, spent)

    def _compute(self, compute: StepCompute, most: int, alike: bool, layout: Layout) -> None:
        """What is captured: from the inputs on the device to the outputs there, without waiting."""
        model = cast(LoopMDM, self.model_of(compute))
        inputs, outputs = layout.inputs(self._inputs), layout.outputs(self._outputs)
        sigma = inputs.sigma.float() if model.config.time_conditioning else None
        stages = model.stages(inputs.tokens, sigma)
        if compute.exit is not None:
            assert compute.exit.threshold is not None
            hidden, used = loop_to_threshold(
                stages, inputs.limits, compute.exit.threshold, compute.min_loops, most
            )
            outputs.loops.copy_(used)
        elif alike:
            hidden = stages.tail(stages.loop(stages.head(), most))
        else:
            hidden = stages.tail(stages.loop(stages.head(), inputs.limits, max_loops=most))
        if not layout.rows:
            return
        sampled = lk.sample_rows(
            hidden,
            self.head(model, sigma),
            inputs.rows,
            RowRng(self._draw.seed, inputs.sequence, inputs.step, inputs.position),
            temperature=self._draw.temperature,
            compute_dtype=model.compute_dtype,
        )
        for place, field in zip(outputs.sampled, sampled, strict=True):
            place.copy_(field)

    def _padded_batch(self, model: LoopMDM, batch: int, width: int) -> int:
        """The size to pad a batch to, without changing the bits of its sequences."""
        if model.config.time_conditioning:  # their modulations are one product, which may round by its size
            return batch
        key = (model, batch, width)
        if key not in self._batches:
            self._batches[key] = graphs.padded_batch(
                batch,
                self._max_batch,
                width,
                cast(DDiTBlock, model.blocks[0]).weights(),
                model.config.num_heads,
                model.compute_dtype,
                model.device,
            )
        return self._batches[key]


def _padded_rows(count: int) -> int:
    return _ROWS * graphs.bucket(math.ceil(count / _ROWS)) if count else 0


def _aligned(size: int) -> int:
    return _ALIGNMENT * math.ceil(size / _ALIGNMENT)


def _end(sizes: list[int]) -> int:
    return sum(map(_aligned, sizes))


def _views(buffer: Tensor, sizes: list[int]) -> list[Tensor]:
    parts = torch.split(buffer[: _end(sizes)], [_aligned(size) for size in sizes])
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _sampled(fields: Tensor) -> SampledRows:
    """The fields [6, R] as tensors of their own."""
    return SampledRows(
        *(
            field.to(torch.int64 if name.endswith("token") else torch.float32)
            for name, field in zip(SampledRows._fields, fields, strict=True)
        )
    )
