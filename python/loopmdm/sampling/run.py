"""One run: its state, the network calls it takes, and what a step writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from loopmdm.model.flops import SamplingLedger
from loopmdm.plan import StepCompute
from loopmdm.sampling.canvas import Canvas
from loopmdm.sampling.decoding import Decoding
from loopmdm.sampling.network import Call, Network, Spent
from loopmdm.sampling.orders import Order
from loopmdm.sampling.result import StepEvent


class Run(ABC):
    """The state of one run. Bookkeeping stays on the CPU; only the network works on the model's device.

    A kind of run says what a step does, with `calls`, `account` and `write`.
    """

    def __init__(self, canvas: Canvas, order: Order, network: Network, decoding: Decoding) -> None:
        self.tokens, self.lengths = canvas.tokens, canvas.lengths.clone()
        self.order, self.slots = order, order.slots
        self.network = network
        self.decoding = decoding
        self.widths = canvas.lengths.clamp_max(network.context)  # positions the network reads of a sequence
        self.network_calls = torch.zeros_like(canvas.lengths)
        self.loops = torch.zeros_like(canvas.lengths)
        self.ledger = SamplingLedger(int(self.widths.max()))

    @property
    def num_steps(self) -> int:
        """Steps to take, at most."""
        return self.order.num_steps

    @property
    def finished(self) -> bool:
        """Whether no later step can change anything."""
        return self.decoding.skip_unchanged and self.order.finished

    @abstractmethod
    def step(self, step: int) -> StepEvent | None:
        """Run one step and write what it changes into `tokens`; None when it changes nothing."""

    def advance(self, first: int, most: int, watched: bool) -> tuple[int, list[StepEvent]]:
        """Take one step or more, at most so many, from `first` on: how many, and their events if watched."""
        event = self.step(first)
        return 1, [] if event is None else [event]

    def calls(
        self, step: int, active: Tensor, times: Tensor | None, start: Tensor | None = None
    ) -> Iterator[Call]:
        """The active sequences [n] in calls of one model, rule and width, of at most max_batch.

        times: [B], where something depends on them; start: [B], the first position that is read, default 0.
        """
        widths = self.widths[active]
        for compute, numbers, loops in self.computes(step, active, times):
            for width in sorted(set(widths[numbers].tolist())):
                chosen = widths[numbers] == width
                group = active[numbers[chosen]]
                counts = loops[chosen] if isinstance(loops, Tensor) else loops
                for first in range(0, group.numel(), self.network.max_batch):
                    part = slice(first, first + self.network.max_batch)
                    chunk = group[part]
                    read = torch.arange(width) if start is None else start[chunk, None] + torch.arange(width)
                    yield Call(
                        compute,
                        _alike(counts, part),
                        chunk,
                        self.tokens[chunk[:, None], read],
                        None if times is None else times[chunk],
                    )

    def computes(
        self, step: int, active: Tensor, times: Tensor | None
    ) -> Iterator[tuple[StepCompute, Tensor, int | Tensor]]:
        """Which of the active sequences [n] run which model with which rule, and how many loops."""
        plan = self.decoding.plan
        if plan.reading == "masks":
            times = self.slots.masked_share()
        elif plan.num_steps is None or not self.order.timed:
            compute = plan.at(step, plan.num_steps or self.order.num_steps)
            yield compute, torch.arange(active.numel()), self.network.loops_of(compute)
            return
        assert times is not None
        groups: dict[StepCompute, tuple[list[int], list[int]]] = {}
        for number, time in enumerate(times[active].tolist()):
            compute = plan.at_time(time)
            numbers, loops = groups.setdefault(compute._replace(num_loops=None), ([], []))
            numbers.append(number)
            loops.append(self.network.loops_of(compute))
        for compute, (numbers, loops) in groups.items():
            yield compute, torch.tensor(numbers), torch.tensor(loops)

    def account(self, call: Call, spent: Spent, rows: int) -> None:
        """Count a network call, of which `rows` went through the vocabulary head."""
        dims, width = self.network.model_of(call.compute).config, call.tokens.shape[1]
        self.network_calls[call.sequences] += 1
        self.loops[call.sequences] += spent.loops
        self.ledger.record(dims, spent.loops.tolist(), rows, length=width)
        if spent.exits is not None:
            masked = (call.tokens == self.network.config.mask_token_id).sum(dim=1)
            self.ledger.record_tails(dims, int(spent.exits.tails.sum()), length=width)
            self.ledger.record_rows(dims, int((spent.exits.projections * masked).sum()))

    def write(
        self, step: int, changed: Tensor, tokens: Tensor, confidence: Tensor, loops_before: Tensor
    ) -> StepEvent | None:
        """Write tokens [R] into slots [R]; None when there are none. loops_before: [B], before the step."""
        if not changed.numel():
            return None
        slots, end = self.slots, self.decoding.eos_token_id
        sequence, position = slots.sequence[changed], slots.position[changed]
        slots.masked[changed] = tokens == self.network.config.mask_token_id
        self.tokens[sequence, position] = tokens
        if end is not None and bool((ended := tokens == end).any()):
            slots.close_after(sequence[ended], position[ended])
            self.lengths.scatter_reduce_(0, sequence[ended], position[ended] + 1, "amin")
        return StepEvent(step, sequence, position, tokens, confidence, (self.loops - loops_before)[sequence])

    def fill_behind_ends(self) -> None:
        """Write the end-of-sequence token into every filled position behind the first one."""
        if self.decoding.eos_token_id is not None:
            behind = self.slots.closed
            self.tokens[self.slots.sequence[behind], self.slots.position[behind]] = self.decoding.eos_token_id


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
