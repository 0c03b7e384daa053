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


def make_order(name: str, slots: Slots, pace: Pace, window: int | None, seed: int) -> Order:
    """The order `name` of `ORDERS`; raises ValueError where it cannot go at this pace or with a window."""
    if name in ("ancestral", "first_hitting"):
        accepted = "steps" if name == "ancestral" else "tokens_per_step"
        given = {**pace.given, "window": window, "counts": None if pace.counts == "even" else pace.counts}
        for option, value in given.items():
            if value is not None and option != accepted:
                raise ValueError(f"{option} does not go with the order {name}, which draws its reveal times")
        if name == "ancestral":
            return Ancestral(slots, pace.steps, seed)
        return FirstHitting(slots, pace.tokens_per_step, seed)
    if name in RATED:
        if name == "entropy" and pace.threshold is not None:
            pace = pace._replace(threshold=-pace.threshold)  # entropies at most so high
        return Ranked(slots, pace, RATED[name], score=RATED[name], window=window)
    key = PLACED[name](slots, seed)
    if pace.adaptive or window is not None:
        return Ranked(slots, pace, key, window=window)
    return Placed(slots, pace, key)


__all__ = ["COUNTS", "ORDERS", "Order", "Pace", "Slots", "make_order"]
