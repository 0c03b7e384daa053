"""Orders that look at places alone: left to right, and random."""

from __future__ import annotations

from torch import Tensor

from loopmdm.sampling.orders.base import Scheduled
from loopmdm.sampling.orders.pace import Pace, Spread
from loopmdm.sampling.orders.slots import Slots


class Placed(Scheduled):
    """Reveals by ascending key [N] within a block, at a pace that needs no predictions."""

    def __init__(self, slots: Slots, pace: Pace, key: Tensor) -> None:
        spread = Spread(slots.blocks, pace)
        block = slots.blocks.of_slot
        super().__init__(slots, spread.step_of(slots.blocks.rank(key), block), spread.each)


def place_from_the_left(slots: Slots, seed: int) -> Tensor:
    """The leftmost first, so that only the work inside a step can plan ahead."""
    return slots.position


def place_at_random(slots: Slots, seed: int) -> Tensor:
    """A random order of its own for each sequence."""
    return slots.uniforms(seed)
