"""The sampling loop: decide what a step reveals, run only the sequences concerned, write the tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from loopmdm.flops import SamplingLedger
from loopmdm.plan import ComputePlan, as_plan
from loopmdm.sampling.canvas import make_canvas, make_sequence_ids
from loopmdm.sampling.network import Draw, Network, check_models, evaluating
from loopmdm.sampling.orders import ORDERS, Order, Slots
from loopmdm.sampling.result import SampleResult, StepEvent
from loopmdm_kernels.types import SampledRows

MAX_STEPS = 2**30 - 1  # the step is one word of the random number's name


def sample(
    model: Any,
    num_samples: int | None = None,
    length: int | None = None,
    steps: int | None = None,
    order: str = "ancestral",
    plan: int | ComputePlan | None = None,
    prompt: Any = None,
    infill: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_step: Callable[[StepEvent], object] | None = None,
    progress: bool = True,
    *,
    history: bool = False,
    sequence_ids: Tensor | list[int] | None = None,
    max_batch: int | None = None,
    skip_unchanged: bool = True,
    dtype: torch.dtype | None = None,
) -> SampleResult:
    """Sample token sequences from a masked diffusion model.

    Random numbers are named by (seed, sequence id, step, position), so a sequence does not depend on the
    batch it is sampled in, nor on max_batch and skip_unchanged. The model is left as it was; an autocast
    context of the caller applies.

    Args:
        model: a `LoopMDM`.
        num_samples: B; default as many as prompt or infill give, else 8.
        length: L; default the length of infill, else the model's max_length.
        steps: T denoising steps. Default: what the plan covers, else L (ancestral) or one token a step (other
            orders).
        order: "ancestral" (exact reverse process), "confidence" (most probable prediction first) or
            "left_to_right".
        plan: loops per step: None = the model's max_loops, a loop count, or a `ComputePlan`.
        prompt: token ids every sequence starts with: [P], [B, P], or a list of B token lists of any lengths.
        infill: int64 [L] or [B, L] that holds the mask token at the positions to fill; all others stay as
            they are.
        temperature: divides the logits before the draw; 0 takes the most probable token.
        top_p: draw from the most probable tokens that together reach this probability, in (0, 1].
        seed: 0 <= seed < 2^63.
        on_step: called with a `StepEvent` after every step that revealed something; what it raises ends the
            run.
        progress: show a progress bar when standard error is a terminal.
        history: keep all step events in the result.
        sequence_ids: [B] ids that name the sequences' random numbers; default 0..B - 1.
        max_batch: at most this many sequences in one forward pass.
        skip_unchanged: False runs the network on every sequence at every step, which changes the cost alone.
        dtype: torch.bfloat16 runs the matrix products in bf16 by autocast; None leaves autocast as it is.

    Raises:
        ValueError, TypeError: on arguments out of range, and on predictions that are not finite (NaN in
            weights).
    """
    _check_options(steps, order, temperature, top_p, seed, max_batch, dtype)
    plan = as_plan(plan)
    canvas = make_canvas(model.config, num_samples, length, prompt, infill)
    ids = make_sequence_ids(sequence_ids, canvas.shape[0])
    slots = Slots.of(canvas, model.config.mask_token_id, ids)
    ordered = ORDERS[order](slots, plan.num_steps if steps is None else steps, seed)
    plan.check_steps(ordered.num_steps)
    models = check_models(model, plan, canvas.shape[1])

    run = _Run(canvas, slots, ordered, Network(model, Draw(float(temperature), float(top_p), seed)))
    events: list[StepEvent] = []
    start = time.perf_counter()
    cast = torch.autocast(model.device.type, dtype) if dtype is not None else nullcontext()
    with (
        evaluating(models),
        cast,
        _progress_bar(progress, ordered.num_steps) as advance,
    ):
        for step in range(ordered.num_steps):
            event = run.step(step, plan, max_batch, skip_unchanged)
            if event is not None:
                if history:
                    events.append(event)
                if on_step is not None:
                    on_step(event)
            advance()
    return SampleResult(
        tokens=run.tokens.to(model.device),
        network_calls=run.network_calls.to(model.device),
        loops=run.loops.to(model.device),
        rows_projected=run.ledger.rows_projected,
        num_steps=ordered.num_steps,
        seconds=time.perf_counter() - start,
        ledger=run.ledger,
        history=events if history else None,
    )


class _Run:
    """The state of one run. Bookkeeping stays on the CPU; only the network works on the model's device."""

    def __init__(self, canvas: Tensor, slots: Slots, order: Order, network: Network) -> None:
        batch, self._length = canvas.shape
        self.tokens = canvas
        self.network_calls = torch.zeros(batch, dtype=torch.int64)
        self.loops = torch.zeros(batch, dtype=torch.int64)
        self.ledger = SamplingLedger(self._length)
        self._slots = slots
        self._order = order
        self._network = network

    def step(
        self, step: int, plan: ComputePlan, max_batch: int | None, skip_unchanged: bool
    ) -> StepEvent | None:
        """Run one step and write what it reveals into `tokens`; None when it reveals nothing."""
        candidates = self._order.candidates(step)
        sequence, position = self._slots.sequence[candidates], self._slots.position[candidates]
        batch = self.tokens.shape[0]
        active = torch.arange(batch)
        if skip_unchanged:
            active = active[sequence.bincount(minlength=batch) > 0]
        if not active.numel():
            return None
        compute = plan.at(step, self._order.num_steps)
        dims = self._network.model_of(compute).config
        times = self._order.times(step)
        loops_now = torch.zeros(batch, dtype=torch.int64)
        parts: list[SampledRows] = []
        size = max_batch or batch
        for chunk in (active[start : start + size] for start in range(0, active.numel(), size)):
            inside = slice(*torch.searchsorted(sequence, torch.stack((chunk[0], chunk[-1] + 1))).tolist())
            rows = torch.searchsorted(chunk, sequence[inside]) * self._length + position[inside]
            names = (
                self._slots.sequence_id[candidates[inside]],
                torch.full_like(rows, step),
                position[inside],
            )
            prediction = self._network.predict(self.tokens[chunk], times[chunk], compute, rows, names)
            loops_now[chunk] = prediction.loops
            self.network_calls[chunk] += 1
            self.ledger.record(dims, prediction.loops.tolist(), rows.numel())
            if prediction.sampled is not None:
                _check_finite(prediction.sampled, step, sequence[inside], position[inside])
                parts.append(prediction.sampled)
        self.loops += loops_now
        if not parts:
            return None
        sampled = SampledRows(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        chosen = self._order.choose(step, candidates, sampled)
        sequence, position, tokens = sequence[chosen], position[chosen], sampled.token[chosen]
        self.tokens[sequence, position] = tokens
        return StepEvent(
            step, sequence, position, tokens, sampled.log_prob[chosen].exp(), loops_now[sequence]
        )


def _check_finite(sampled: SampledRows, step: int, sequence: Tensor, position: Tensor) -> None:
    broken = ~torch.isfinite(sampled.log_prob)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise ValueError(
            f"the model's prediction is not finite at step {step}, sequence {int(sequence[first])}, position"
            f" {int(position[first])}: check the weights for NaN and infinity"
        )


def _check_options(
    steps: int | None,
    order: str,
    temperature: float,
    top_p: float,
    seed: int,
    max_batch: int | None,
    dtype: torch.dtype | None,
) -> None:
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}, accepted are {', '.join(sorted(ORDERS))}")
    for name, count in (("steps", steps), ("max_batch", max_batch)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise TypeError(f"{name} must be an int or None, got {count!r}")
        if count is not None and not 1 <= count <= MAX_STEPS:
            raise ValueError(f"{name} must be in 1..{MAX_STEPS}, got {count}")
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int with 0 <= seed < 2^63, got {seed!r}")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype must be None or torch.bfloat16, got {dtype}")


@contextmanager
def _progress_bar(wanted: bool, num_steps: int) -> Iterator[Callable[[], object]]:
    """Yields the function to call after each step. Draws on standard error, and only on a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task("sampling", total=num_steps)
        yield lambda: bar.advance(task)
