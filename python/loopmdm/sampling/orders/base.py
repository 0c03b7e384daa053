"""What an order is: the rule that decides which masked positions a step reveals."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from loopmdm.sampling.orders.pace import Schedule
from loopmdm.sampling.orders.slots import Slots
from loopmdm_kernels.types import RevealRule, SampledRows


class Order(ABC):
    """Which slots a step may reveal, and which of them it does. Slots are named by their index in `slots`.

    The caller marks in `slots` what was revealed, masked again or closed.
    """

    steps: Tensor  # [B] of each sequence; at most, where they depend on predictions
    exact = False  # samples follow the model's reverse process: of T steps, or in continuous time
    timed = False  # a step has no fixed place in the denoising: plans go by `times`

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    @abstractmethod
    def candidates(self, step: int) -> Tensor:
        """Slots [R] whose prediction this step needs, ascending. Empty: no network call."""

    def choose(self, step: int, candidates: Tensor, sampled: SampledRows) -> Tensor:
        """Boolean [R]: the candidates revealed now, given their predictions."""
        return torch.ones_like(candidates, dtype=torch.bool)

    @property
    def rule(self) -> RevealRule | None:
        """What decides, as data; None: only `candidates`, `choose` and `remasked` say it.

        A class that overrides one of these overrides this too.
        """
        return None

    def remasked(self, step: int) -> Tensor | None:
        """Slots that this step masks again, or None."""
        return None

    @property
    def num_steps(self) -> int:
        """Steps of the sequence that takes most."""
        return int(self.steps.max()) if self.steps.numel() else 0

    @property
    def finished(self) -> bool:
        """Whether no later step can change anything: nothing is left to reveal."""
        return not bool((self.slots.masked & ~self.slots.closed).any())

    def times(self, step: int) -> Tensor:
        """Diffusion time t of each sequence before the step, float64 [B]: 1 at the start, 0 when finished.

        By default the share of its slots that are masked, where a linear schedule would be.
        """
        return self.slots.masked_share()


class Scheduled(Order):
    """An order that knows every slot's step beforehand: only rows about to be revealed are ever predicted."""

    def __init__(self, slots: Slots, reveal_step: Tensor, steps: Tensor) -> None:
        super().__init__(slots)
        self.steps = steps
        self.schedule = Schedule(reveal_step, self.num_steps)

    def candidates(self, step: int) -> Tensor:
        due = self.schedule.at(step)
        return due[~self.slots.closed[due]]

    @property
    def rule(self) -> RevealRule | None:
        return RevealRule((self.schedule.by_step, self.schedule.ends))
