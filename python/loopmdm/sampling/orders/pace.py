"""How many positions a step reveals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm.sampling.orders.slots import Blocks

COUNTS = ("even", "llada")


class Pace(NamedTuple):
    """How many positions a step reveals: at most one of the first four is set; none means one.

    threshold and entropy_bound need predictions to decide.
    """

    steps: int | None = None  # shared out over so many steps
    tokens_per_step: int | None = None
    threshold: float | None = None  # what is predicted this surely
    entropy_bound: float | None = None  # as much as keeps the error of parallel draws below this, nats
    counts: str = "even"  # of `COUNTS`: how steps that do not divide the positions are made up
    window: int | None = None  # it reveals among the so many leftmost masks

    @property
    def adaptive(self) -> bool:
        return self.threshold is not None or self.entropy_bound is not None


class Spread:
    """When each block of slots has its turn, and which step reveals the r-th slot of a block.

    steps = T, of all sequences or of each [B]: a sequence's blocks share T as evenly as whole numbers allow;
    step i of the T_b steps of a block with n_b slots reveals floor((i + 1) n_b / T_b) - floor(i n_b / T_b) of
    them. With counts = "llada" T must be a multiple of the number of blocks, and step i reveals
    floor(n_b / T_b), the first n_b mod T_b steps one more (LLaDA's generate.py, get_num_transfer_tokens).
    tokens_per_step = k: every step reveals k slots, the last one of a block what is left.
    """

    def __init__(self, blocks: Blocks, pace: Pace, steps: Tensor | None = None) -> None:
        """steps: of each sequence [B], in place of those of the pace."""
        self._sizes = blocks.sizes
        self._first_more = pace.counts == "llada"
        self._per_step = None
        if pace.steps is None and steps is None:
            self._per_step = pace.tokens_per_step or 1
            self.steps = (blocks.sizes + self._per_step - 1) // self._per_step  # [G]
            before = self.steps.cumsum(0) - self.steps
            first = blocks.first[blocks.sequence]
            self.start = before - before[first]  # [G]
            self.each = torch.zeros_like(blocks.count).index_add_(0, blocks.sequence, self.steps)
            return
        if steps is None:
            steps = torch.full_like(blocks.count, pace.steps or 0)
        self.each = steps  # [B] steps of each sequence
        short = (blocks.count > steps).nonzero()
        if short.numel():
            first = short[0]
            raise ValueError(
                f"steps is {int(steps[first])}, but there are {int(blocks.count[first])} blocks, and each"
                " takes a step"
            )
        uneven = (blocks.count > 0) & (steps % blocks.count.clamp_min(1) != 0)
        if self._first_more and bool(uneven.any()):
            first = uneven.nonzero()[0]
            raise ValueError(
                f"steps is {int(steps[first])}, but there are {int(blocks.count[first])} blocks, and with"
                ' counts="llada" each takes the same number of steps'
            )
        count, total = blocks.count[blocks.sequence], steps[blocks.sequence]
        self.start = total * blocks.index // count
        self.steps = total * (blocks.index + 1) // count - self.start

    def step_of(self, rank: Tensor, block: Tensor) -> Tensor:
        """The step that reveals the rank-th slot of its block."""
        if self._per_step is not None:
            return self.start[block] + rank // self._per_step
        size, steps = self._sizes[block], self.steps[block]
        if not self._first_more:
            return self.start[block] + ((rank + 1) * steps - 1) // size
        least, more = size // steps, size % steps
        behind = rank - more * (least + 1)  # place among the slots of the steps that reveal the least
        inside = torch.where(behind < 0, rank // (least + 1), more + behind // least.clamp_min(1))
        return self.start[block] + inside


class Schedule:
    """Slots by the step that reveals them."""

    def __init__(self, reveal_step: Tensor, num_steps: int) -> None:
        self.num_steps = num_steps
        self.by_step = torch.argsort(reveal_step, stable=True)  # [N] slots
        self.ends = torch.bincount(reveal_step, minlength=num_steps).cumsum(0)  # [num_steps] in `by_step`
        self._bounds = [0, *self.ends.tolist()]

    def at(self, step: int) -> Tensor:
        """Slots of the step, ascending."""
        return self.by_step[self._bounds[step] : self._bounds[step + 1]]
