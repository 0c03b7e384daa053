"""Decoding orders, one idea a file. To add one: give it a key or a rating below, or derive from `Order`."""

from __future__ import annotations

from loopmdm.sampling.orders.ancestral import Ancestral, FirstHitting
from loopmdm.sampling.orders.base import Order
from loopmdm.sampling.orders.pace import COUNTS, Pace
from loopmdm.sampling.orders.placed import Placed, place_at_random, place_from_the_left
from loopmdm.sampling.orders.ranked import Ranked, confidence, margin, negative_entropy
from loopmdm.sampling.orders.slots import Slots

PLACED = {"left_to_right": place_from_the_left, "random": place_at_random}
RATED = {"confidence": confidence, "margin": margin, "entropy": negative_entropy}
ORDERS = ("ancestral", "first_hitting", *RATED, *PLACED)


def make_order(name: str, slots: Slots, pace: Pace, seed: int) -> Order:
    """The order `name` of `ORDERS`."""
    if name == "ancestral":
        return Ancestral(slots, pace.steps, seed)
    if name == "first_hitting":
        return FirstHitting(slots, pace.tokens_per_step, seed)
    if name in RATED:
        if name == "entropy" and pace.threshold is not None:
            pace = pace._replace(threshold=-pace.threshold)  # entropies at most so high
        return Ranked(slots, pace, RATED[name], score=RATED[name])
    key = PLACED[name](slots, seed)
    return Ranked(slots, pace, key) if pace.adaptive or pace.window is not None else Placed(slots, pace, key)


__all__ = ["COUNTS", "ORDERS", "Order", "Pace", "Slots", "make_order"]
