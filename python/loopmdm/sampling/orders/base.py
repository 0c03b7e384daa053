"""What an order is: the rule that decides which masked positions a step reveals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.types import SampledRows


class Slots(NamedTuple):
    """The N positions to fill, ordered by sequence, then by position. All on the CPU."""

    sequence: Tensor  # [N] int64, row of the batch
    position: Tensor  # [N] int64
    sequence_id: Tensor  # [N] int64, names the sequence's random numbers
    counts: Tensor  # [B] int64, slots of each sequence
    length: int  # L

    @classmethod
    def of(cls, canvas: Tensor, mask_token_id: int, sequence_ids: Tensor) -> Slots:
        """The slots of canvas [B, L]: every position that holds the mask token."""
        masked = canvas == mask_token_id
        sequence, position = masked.nonzero(as_tuple=True)
        return cls(sequence, position, sequence_ids[sequence], masked.sum(dim=1), canvas.shape[1])

    def ranks(self) -> Tensor:
        """Index of each slot among the slots of its sequence, from the left: [N]."""
        first = self.counts.cumsum(0) - self.counts
        return torch.arange(self.sequence.numel()) - first[self.sequence]


class Order(ABC):
    """Which slots a step may reveal, and which of them it does.

    An order is made as `Order(slots, steps, seed)`, steps = None meaning its own default. Slots are named by
    their index in `slots`.
    """

    num_steps: int

    @abstractmethod
    def candidates(self, step: int) -> Tensor:
        """Slots [R] whose prediction this step needs, ascending by sequence. Empty: no network call."""

    @abstractmethod
    def choose(self, step: int, candidates: Tensor, sampled: SampledRows) -> Tensor:
        """Boolean [R]: the candidates revealed now, given their predictions; each slot is revealed once."""

    @abstractmethod
    def times(self, step: int) -> Tensor:
        """Diffusion time t of each sequence before the step, float64 [B]: 1 at the start, 0 when finished."""


class Scheduled(Order):
    """An order that knows every slot's step beforehand: only rows about to be revealed are ever predicted."""

    def __init__(self, reveal_step: Tensor, num_steps: int) -> None:
        self.num_steps = num_steps
        self._by_step = torch.argsort(reveal_step, stable=True)
        ends = torch.bincount(reveal_step, minlength=num_steps).cumsum(0).tolist()
        self._bounds = [0, *ends]

    def candidates(self, step: int) -> Tensor:
        return self._by_step[self._bounds[step] : self._bounds[step + 1]]

    def choose(self, step: int, candidates: Tensor, sampled: SampledRows) -> Tensor:
        return torch.ones_like(candidates, dtype=torch.bool)


class EvenSpread:
    """n slots of a sequence over T steps: step i reveals floor((i + 1) n / T) - floor(i n / T) of them.

    Without a number of steps every sequence takes its own n: one slot a step.
    """

    def __init__(self, counts: Tensor, steps: int | None) -> None:
        self.counts = counts
        self.steps = counts.clamp_min(1) if steps is None else torch.full_like(counts, steps)
        self.num_steps = int(counts.max()) if steps is None else steps

    def revealed_before(self, step: int) -> Tensor:
        """Slots of each sequence revealed before `step`: [B]."""
        return self.steps.clamp_max(step) * self.counts // self.steps

    def step_of(self, rank: Tensor, sequence: Tensor) -> Tensor:
        """The step that reveals the rank-th slot of its sequence: the last i with floor(i n / T) <= rank."""
        return ((rank + 1) * self.steps[sequence] - 1) // self.counts[sequence]

    def times(self, step: int) -> Tensor:
        """Share of the slots still masked before `step`, where a linear schedule would be: [B]."""
        left = self.counts - self.revealed_before(step)
        return left.double() / self.counts.clamp_min(1)
