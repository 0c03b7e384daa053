"""How sure a median is, from its order statistics: no assumption about the law of the times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A median and the interval that holds the true one in at least `CONFIDENCE` of all runs, if it can."""

    median: float
    low: float
    high: float

    def rounded(self, digits: int) -> list[float]:
        return [float(f"{value:.{digits}g}") for value in self]


def of_median(values: Sequence[float]) -> Interval:
    """The k-th smallest to the k-th largest of n values, k the largest whose interval is sure enough.

    It misses the true median with probability 2 P(Binomial(n, 1/2) < k). Fewer than six values are never sure
    enough: their range is returned (five values: 93.75 %).
    """
    ordered = sorted(values)
    n, k, missed = len(ordered), 0, 0.0
    while k < n // 2:
        missed += 2 * math.comb(n, k) / 2**n
        if missed > 1 - CONFIDENCE:
            break
        k += 1
    k = max(k, 1)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Turn by turn, so that a slow spell of the machine is in both."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def apart(old: Sequence[float], new: Sequence[float]) -> bool:
    """Whether two intervals (median, low, high) have nothing in common."""
    return new[1] > old[2] or new[2] < old[1]
