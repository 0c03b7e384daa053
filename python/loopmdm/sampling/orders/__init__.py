"""Decoding orders, one idea a file. To add one: derive from Scheduled, Ranked or Order and list it here."""

from collections.abc import Callable

from loopmdm.sampling.orders.ancestral import Ancestral
from loopmdm.sampling.orders.base import Order, Slots
from loopmdm.sampling.orders.left_to_right import LeftToRight
from loopmdm.sampling.orders.ranked import Confidence

ORDERS: dict[str, Callable[[Slots, int | None, int], Order]] = {
    "ancestral": Ancestral,
    "confidence": Confidence,
    "left_to_right": LeftToRight,
}

__all__ = ["ORDERS", "Order", "Slots"]
