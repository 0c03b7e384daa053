"""Orders that predict every masked position and reveal those the prediction rates best."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from loopmdm.sampling.orders.base import EvenSpread, Order, Slots
from loopmdm_kernels.types import SampledRows


class Ranked(Order):
    """Reveals the best rated positions of each sequence, the lowest position on ties.

    One position a step by default, else spread evenly over the steps.
    """

    def __init__(self, slots: Slots, steps: int | None, seed: int) -> None:
        self._slots = slots
        self._spread = EvenSpread(slots.counts, steps)
        self._masked = torch.ones_like(slots.sequence, dtype=torch.bool)
        self.num_steps = self._spread.num_steps

    @abstractmethod
    def rate(self, sampled: SampledRows) -> Tensor:
        """Rating [R]; the highest are revealed first."""

    def candidates(self, step: int) -> Tensor:
        due = self._num_due(step) > 0
        return (self._masked & due[self._slots.sequence]).nonzero().squeeze(1)

    def choose(self, step: int, candidates: Tensor, sampled: SampledRows) -> Tensor:
        best_first = self.rate(sampled).argsort(descending=True, stable=True)
        sequence = self._slots.sequence[candidates]
        grouped = best_first[sequence[best_first].argsort(stable=True)]
        counts = sequence.bincount(minlength=self._slots.counts.numel())
        first = counts.cumsum(0) - counts
        place = torch.arange(candidates.numel()) - first[sequence[grouped]]
        chosen = torch.empty_like(candidates, dtype=torch.bool)
        chosen[grouped] = place < self._num_due(step)[sequence[grouped]]
        self._masked[candidates[chosen]] = False
        return chosen

    def times(self, step: int) -> Tensor:
        return self._spread.times(step)

    def _num_due(self, step: int) -> Tensor:
        return self._spread.revealed_before(step + 1) - self._spread.revealed_before(step)


class Confidence(Ranked):
    """The positions whose most probable token has the highest probability first."""

    def rate(self, sampled: SampledRows) -> Tensor:
        return sampled.top1_prob
