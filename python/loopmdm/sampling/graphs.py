"""Network calls as CUDA graphs: one graph is a whole call, from token ids to the drawn tokens.

What differs from step to step lies in buffers whose addresses do not change; batch and rows are padded to a
few sizes, so that a run needs few graphs. See docs/kernels/machinery.md.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from loopmdm.exits import loop_to_threshold
from loopmdm.model import LoopMDM
from loopmdm.model.modules import DDiTBlock
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm.sampling.buffers import Buffers, Layout, padded_rows
from loopmdm.sampling.decoding import Decoding
from loopmdm.sampling.network import Call, Network, Prediction
from loopmdm_kernels import graphs

MAX_GRAPHS = 32


def check_graphs(models: Iterable[Any], plan: ComputePlan) -> None:
    """Raise ValueError where the calls of a run cannot be captured."""
    for model in models:
        reason = graphs.why_not(model.device)
        if reason is not None:
            raise ValueError(f"cuda_graphs: {reason}")
        if not isinstance(model, LoopMDM):
            raise ValueError(f"cuda_graphs: it takes a LoopMDM, got {type(model).__name__}")
        if cuts := model.cuts():
            raise ValueError(f"cuda_graphs: a graph would not call modules at a replay ({cuts[0]})")
        if model.config.acts_between_loops:
            raise ValueError(
                "cuda_graphs: what happens between loops (damped, inject, loop_embedding, carry_norm) is run"
                " loop by loop from the host"
            )
    for compute in plan.computes:
        if compute.exit is not None and compute.exit.threshold is None:
            raise ValueError(f"cuda_graphs: the exit rule {compute.exit} decides on the host after each loop")


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


class GraphNetwork(Network):
    """The network calls of one run as CUDA graphs. They end with the run, so weights may change between runs.

    Beside a graph, a step is one copy to the device and one back, which waits for the result. Draws with
    top_k or top_p wait for the device: they come behind the graph, which then ends with the residual stream.
    """

    def __init__(self, model: LoopMDM, decoding: Decoding, *, batch: int, context: int) -> None:
        super().__init__(model, decoding, batch=batch, context=context)
        check_graphs(self.models, decoding.plan)
        device, positions = model.device, self.max_batch * context
        self._replays = Replays(graphs.capture_on(device), MAX_GRAPHS)
        self._batches: dict[tuple[Any, int, int], int] = {}
        self._buffers = Buffers(Layout(self.max_batch, context, padded_rows(positions)), device)
        self._stream: Tensor | None = None
        if cast(float, decoding.top_p) < 1 or decoding.top_k is not None:
            hidden = max(model.config.hidden_size for model in self.models)
            self._stream = torch.zeros(positions * hidden, device=device, dtype=torch.float32)

    @torch.inference_mode()
    def predict(self, call: Call, rows: Tensor, names: Sequence[Tensor]) -> Prediction:
        compute, num_loops, sigma = call.compute, call.num_loops, self.sigma(call)
        model = cast(LoopMDM, self.model_of(compute))
        batch, width = call.tokens.shape
        inside = len(rows) if self._stream is None else 0  # rows that are drawn in the graph
        layout = Layout(self._padded_batch(model, batch, width), width, padded_rows(inside))
        drawn_names = [name[:inside] for name in names]
        self._buffers.send(
            layout, call.tokens, rows[:inside], drawn_names, num_loops, compute.min_loops, sigma
        )

        alike = not isinstance(num_loops, Tensor)
        most = num_loops if isinstance(num_loops, int) else graphs.bucket(int(num_loops.max()))
        key = (compute._replace(num_loops=most), alike, layout)
        self._replays.run(key, partial(self._compute, compute, most, alike, layout))

        sampled, loops = self._buffers.receive(layout, batch, inside)
        spent = call.spent(loops)
        if not len(rows):
            return Prediction(None, spent)
        if self._stream is not None:
            sigma = None if sigma is None else sigma.to(model.device)
            sampled = self.draw(model, self._hidden(model, layout)[:batch], sigma, rows, names)
        return Prediction(sampled, spent)

    def _hidden(self, model: LoopMDM, layout: Layout) -> Tensor:
        """Where the graph of a call leaves the residual stream [B, L, D] for a draw behind it."""
        assert self._stream is not None
        shape = (layout.batch, layout.width, model.config.hidden_size)
        return self._stream[: math.prod(shape)].view(shape)

    def _compute(self, compute: StepCompute, most: int, alike: bool, layout: Layout) -> None:
        """What is captured: from the inputs on the device to the outputs there, without waiting."""
        model = cast(LoopMDM, self.model_of(compute))
        inputs, outputs = self._buffers.on_device(layout)
        sigma = inputs.sigma.float() if model.config.time_conditioning else None
        stages = model.stages(inputs.tokens, sigma)
        if compute.exit is not None:
            assert compute.exit.threshold is not None
            hidden, used = loop_to_threshold(
                stages, inputs.limits, compute.exit.threshold, compute.min_loops, most
            )
            outputs.loops.copy_(used)
        elif alike:
            hidden = stages.after(stages.loop(stages.before(), most))
        else:
            hidden = stages.after(stages.loop(stages.before(), inputs.limits, max_loops=most))
        if self._stream is not None:
            self._hidden(model, layout).copy_(hidden)
        if not layout.rows:
            return
        sampled = self.sample_rows(model, hidden, sigma, inputs.rows, inputs.names)
        for place, field in zip(outputs.sampled, sampled, strict=True):
            place.copy_(field)

    def _padded_batch(self, model: LoopMDM, batch: int, width: int) -> int:
        """The size to pad a batch to, without changing the bits of its sequences."""
        if model.config.time_conditioning:  # modulations are made row by row: padding would add calls
            return batch
        key = (model, batch, width)
        if key not in self._batches:
            self._batches[key] = graphs.padded_batch(
                batch,
                self.max_batch,
                width,
                cast(DDiTBlock, model.blocks[0]).weights(),
                model.config.num_heads,
                model.compute_dtype,
                model.device,
            )
        return self._batches[key]
