"""Left to right: the leftmost masked positions first, so that only the work inside a step can plan ahead."""

from __future__ import annotations

from torch import Tensor

from loopmdm.sampling.orders.base import EvenSpread, Scheduled, Slots


class LeftToRight(Scheduled):
    """Reveals by position, one position a step by default, else spread evenly over the steps."""

    def __init__(self, slots: Slots, steps: int | None, seed: int) -> None:
        self._spread = EvenSpread(slots.counts, steps)
        super().__init__(self._spread.step_of(slots.ranks(), slots.sequence), self._spread.num_steps)

    def times(self, step: int) -> Tensor:
        return self._spread.times(step)
