"""One run, step by step: ask the order what it needs, compute only that, write what it reveals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm.flops import SamplingLedger
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm.sampling.canvas import Canvas
from loopmdm.sampling.network import Network
from loopmdm.sampling.orders import Order
from loopmdm.sampling.result import StepEvent
from loopmdm_kernels.types import SampledRows


class Limits(NamedTuple):
    """What bounds the work of a network call."""

    context: int  # positions the network reads at once
    max_batch: int | None
    skip_unchanged: bool


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
            confidence = torch.empty(0)
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
            active = torch.arange(batch)
        if not active.numel():
            return None
        times = self._order.times(step) if self._order.timed or self._network.needs_times else None
        ends = torch.zeros(batch, dtype=torch.int64)
        ends.scatter_reduce_(0, sequence, slots.blocks.end[slots.blocks.of_slot[candidates]], "amax")
        start = (ends - self._limits.context).clamp_min(0)  # of what the network reads
        results: list[tuple[Tensor, SampledRows]] = []
        for compute, width, chunk in self._calls(step, active, times):
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
            prediction = self._network.predict(
                self.tokens[chunk[:, None], read],
                None if times is None else times[chunk],
                compute,
                rows,
                names,
            )
            loops_now[chunk] = prediction.loops
            self.network_calls[chunk] += 1
            dims = self._network.model_of(compute).config
            self.ledger.record(dims, prediction.loops.tolist(), rows.numel(), length=width)
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

    def _calls(
        self, step: int, active: Tensor, times: Tensor | None
    ) -> Iterator[tuple[StepCompute, int, Tensor]]:
        """Active sequences that one call can compute: of equal compute and length, at most max_batch."""
        widths = self._widths[active]
        for number, compute in self._computes(step, active, times):
            for width in sorted(set(widths[number].tolist())):
                group = active[number[widths[number] == width]]
                for chunk in torch.split(group, self._limits.max_batch or group.numel()):
                    yield compute, width, chunk

    def _computes(
        self, step: int, active: Tensor, times: Tensor | None
    ) -> Iterator[tuple[Tensor, StepCompute]]:
        """Which of the active sequences [n] run which compute of the plan."""
        everyone = torch.arange(active.numel())
        total = self._plan.num_steps
        if total is None or not self._order.timed:
            yield everyone, self._plan.at(step, self._order.num_steps if total is None else total)
            return
        assert times is not None
        index = ((1.0 - times[active]) * total).long().clamp(0, total - 1)
        computes: dict[StepCompute, list[int]] = {}
        for number, place in enumerate(index.tolist()):
            computes.setdefault(self._plan.at(place, total), []).append(number)
        for compute, numbers in computes.items():
            yield torch.tensor(numbers), compute

    def _end_sequences(self, sequence: Tensor, position: Tensor, ended: Tensor) -> None:
        """Close what lies behind the positions [R] where `ended` [R]."""
        if bool(ended.any()):
            self._slots.close_after(sequence[ended], position[ended])
            self.lengths.scatter_reduce_(0, sequence[ended], position[ended] + 1, "amin")


def check_finite(prediction: Tensor, step: int, sequence: Tensor, position: Tensor) -> None:
    """Raise ValueError where a prediction [R] of positions [R] is NaN or infinite."""
    broken = ~torch.isfinite(prediction)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise ValueError(
            f"the model's prediction is not finite at step {step}, sequence {int(sequence[first])}, position"
            f" {int(position[first])}: check the weights for NaN and infinity"
        )
