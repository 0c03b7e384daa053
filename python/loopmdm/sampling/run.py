"""One run, step by step: ask the order what it needs, compute only that, write what it reveals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm.model.flops import SamplingLedger
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm.sampling.canvas import Canvas
from loopmdm.sampling.network import Network, Spent
from loopmdm.sampling.orders import Order
from loopmdm.sampling.result import StepEvent
from loopmdm_kernels.types import SampledRows


class Limits(NamedTuple):
    """What bounds the work of a network call."""

    context: int  # positions the network reads at once
    max_batch: int | None
    skip_unchanged: bool


class Call(NamedTuple):
    """One network call."""

    compute: StepCompute
    num_loops: int | Tensor  # of all its sequences, or of each: int64 [b]
    width: int  # positions the network reads
    sequences: Tensor  # [b] int64


class Run:
    """The state of one run. Bookkeeping stays on the CPU; only the network works on the model's device."""

    def __init__(
        self,
        canvas: Canvas,
        order: Order,
        network: Network,
        plan: ComputePlan,
        limits: Limits,
        config: Any,
        sequence_ids: Tensor,
        eos_token_id: int | None,
    ) -> None:
        self.tokens, self.lengths = canvas.tokens, canvas.lengths.clone()
        self._widths = canvas.lengths.clamp_max(limits.context)  # positions the network reads of a sequence
        batch, longest = canvas.tokens.shape
        self.network_calls = torch.zeros(batch, dtype=torch.int64)
        self.loops = torch.zeros(batch, dtype=torch.int64)
        self.ledger = SamplingLedger(min(longest, limits.context))
        self._slots = order.slots
        self._order = order
        self._network = network
        self._plan = plan
        self._limits = limits
        self._sequence_ids = sequence_ids
        self._mask_token_id = config.mask_token_id
        self._eos_token_id = eos_token_id

    @property
    def num_steps(self) -> int:
        """Steps to take, at most."""
        return self._order.num_steps

    @property
    def finished(self) -> bool:
        """Whether no later step can change anything."""
        return self._order.finished

    def step(self, step: int) -> StepEvent | None:
        """Run one step and write what it changes into `tokens`; None when it changes nothing."""
        order = self._order
        again = order.remasked(step)
        candidates = order.candidates(step)
        loops_now = torch.zeros_like(self.loops)
        sampled = self._predict(step, candidates, loops_now)
        self.loops += loops_now
        if sampled is None:
            revealed, tokens = candidates[:0], candidates[:0]
            confidence = torch.empty(0, dtype=torch.float32)
        else:
            chosen = order.choose(step, candidates, sampled)
            revealed, tokens = candidates[chosen], sampled.token[chosen]
            confidence = sampled.log_prob[chosen].exp()
        if again is not None:
            revealed = torch.cat((revealed, again))
            tokens = torch.cat((tokens, torch.full_like(again, self._mask_token_id)))
            confidence = torch.cat((confidence, confidence.new_zeros(again.numel())))
            by_place = revealed.argsort()
            revealed, tokens, confidence = revealed[by_place], tokens[by_place], confidence[by_place]
        return self._write(step, revealed, tokens, confidence, loops_now)

    def _write(
        self, step: int, slots_changed: Tensor, tokens: Tensor, confidence: Tensor, loops_now: Tensor
    ) -> StepEvent | None:
        """Write tokens [R] into slots [R]; None when there are none."""
        if not slots_changed.numel():
            return None
        slots = self._slots
        sequence, position = slots.sequence[slots_changed], slots.position[slots_changed]
        slots.masked[slots_changed] = tokens == self._mask_token_id
        self.tokens[sequence, position] = tokens
        if self._eos_token_id is not None:
            self._end_sequences(sequence, position, tokens.eq(self._eos_token_id))
        return StepEvent(step, sequence, position, tokens, confidence, loops_now[sequence])

    def fill_behind_ends(self) -> None:
        """Write the end-of-sequence token into every filled position behind the first one."""
        if self._eos_token_id is not None:
            behind = self._slots.closed
            self.tokens[self._slots.sequence[behind], self._slots.position[behind]] = self._eos_token_id

    def _predict(self, step: int, candidates: Tensor, loops_now: Tensor) -> SampledRows | None:
        """Predictions of the candidates [R], or None if there are none; writes the loops spent."""
        slots = self._slots
        sequence, position = slots.sequence[candidates], slots.position[candidates]
        batch = self.tokens.shape[0]
        if self._limits.skip_unchanged:
            active = (sequence.bincount(minlength=batch) > 0).nonzero().squeeze(1)
        else:
            active = (self._order.steps > step).nonzero().squeeze(1)
        if not active.numel():
            return None
        times = self._times(step)
        ends = torch.zeros(batch, dtype=torch.int64)
        ends.scatter_reduce_(0, sequence, slots.blocks.end[slots.blocks.of_slot[candidates]], "amax")
        start = (ends - self._limits.context).clamp_min(0)  # of what the network reads
        results: list[tuple[Tensor, SampledRows]] = []
        for call in self._calls(step, active, times):
            chunk, width = call.sequences, call.width
            place = torch.full((batch,), -1)
            place[chunk] = torch.arange(chunk.numel())
            inside = (place[sequence] >= 0).nonzero().squeeze(1)
            rows = place[sequence[inside]] * width + position[inside] - start[sequence[inside]]
            read = start[chunk, None] + torch.arange(width)
            names = (
                slots.sequence_id[candidates[inside]],
                torch.full_like(rows, step),
                position[inside],
            )
            tokens = self.tokens[chunk[:, None], read]
            prediction = self._network.predict(
                tokens, None if times is None else times[chunk], call.compute, call.num_loops, rows, names
            )
            self.account(call, tokens, prediction.spent, rows.numel())
            loops_now[chunk] = prediction.spent.loops
            if prediction.sampled is not None:
                check_finite(prediction.sampled.log_prob, step, sequence[inside], position[inside])
                results.append((inside, prediction.sampled))
        if not results:
            return None
        if len(results) == 1:
            return results[0][1]
        back = torch.cat([inside for inside, _ in results]).argsort()
        return SampledRows(
            *(torch.cat(fields)[back] for fields in zip(*(s for _, s in results), strict=True))
        )

    def account(self, call: Call, tokens: Tensor, spent: Spent, rows: int) -> None:
        """Count a network call on tokens [b, L], of which `rows` went through the vocabulary head."""
        dims = self._network.model_of(call.compute).config
        self.network_calls[call.sequences] += 1
        self.ledger.record(dims, spent.loops.tolist(), rows, length=call.width)
        if spent.exits is not None:
            masked = (tokens == self._mask_token_id).sum(dim=1)
            self.ledger.record_tails(dims, int(spent.exits.tails.sum()), length=call.width)
            self.ledger.record_rows(dims, int((spent.exits.projections * masked).sum()))

    def _times(self, step: int) -> Tensor | None:
        """Diffusion times [B] before the step, where something depends on them."""
        by_time = self._order.timed and self._plan.reading == "step"
        return self._order.times(step) if by_time or self._network.needs_times else None

    def _calls(self, step: int, active: Tensor, times: Tensor | None) -> Iterator[Call]:
        """Active sequences that one call can compute: of one model, rule and length, at most max_batch."""
        widths = self._widths[active]
        for compute, numbers, loops in self._computes(step, active, times):
            for width in sorted(set(widths[numbers].tolist())):
                chosen = widths[numbers] == width
                group = active[numbers[chosen]]
                size = self._limits.max_batch or group.numel()
                counts = loops[chosen] if isinstance(loops, Tensor) else loops
                for start in range(0, group.numel(), size):
                    part = slice(start, start + size)
                    yield Call(compute, _alike(counts, part), width, group[part])

    def _computes(
        self, step: int, active: Tensor, times: Tensor | None
    ) -> Iterator[tuple[StepCompute, Tensor, int | Tensor]]:
        """Which of the active sequences [n] run which model with which rule, and how many loops."""
        plan = self._plan
        if plan.reading == "masks":
            times = self._slots.masked_share()
        elif plan.num_steps is None or not self._order.timed:
            compute = plan.at(step, plan.num_steps or self._order.num_steps)
            yield compute, torch.arange(active.numel()), self._network.loops_of(compute)
            return
        assert times is not None
        groups: dict[StepCompute, tuple[list[int], list[int]]] = {}
        for number, time in enumerate(times[active].tolist()):
            compute = plan.at_time(time)
            numbers, loops = groups.setdefault(compute._replace(num_loops=None), ([], []))
            numbers.append(number)
            loops.append(self._network.loops_of(compute))
        for compute, (numbers, loops) in groups.items():
            yield compute, torch.tensor(numbers), torch.tensor(loops)

    def _end_sequences(self, sequence: Tensor, position: Tensor, ended: Tensor) -> None:
        """Close what lies behind the positions [R] where `ended` [R]."""
        if bool(ended.any()):
            self._slots.close_after(sequence[ended], position[ended])
            self.lengths.scatter_reduce_(0, sequence[ended], position[ended] + 1, "amin")


def _alike(counts: int | Tensor, part: slice) -> int | Tensor:
    """Loops of the sequences in a part: one number where they are equal."""
    if not isinstance(counts, Tensor):
        return counts
    some = counts[part]
    return int(some[0]) if bool((some == some[0]).all()) else some


class NotFiniteError(ValueError):
    """A prediction is NaN or infinite: the weights' fault, not the options'."""

    of_the_model = True


def check_finite(prediction: Tensor, step: int, sequence: Tensor, position: Tensor) -> None:
    """Raise ValueError where a prediction [R] of positions [R] is NaN or infinite."""
    broken = ~torch.isfinite(prediction)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise NotFiniteError(
            f"the model's prediction is not finite at step {step}, sequence {int(sequence[first])}, position"
            f" {int(position[first])}: check the weights for NaN and infinity"
        )
