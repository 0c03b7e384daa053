"""Whether draws follow a law."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def chi_square_p(counts: Array, probs: Array, *, least_expected: float = 5.0) -> float:
    """p-value of counts [V] of independent draws against probs [V], float64.

    The rarest outcomes are pooled until each cell expects at least `least_expected` draws. Needs scipy.
    """
    from scipy import stats

    if counts.shape != probs.shape or counts.ndim != 1:
        raise ValueError(f"counts, probs: got shapes {counts.shape} and {probs.shape}, expected both [V]")
    order = np.argsort(probs, kind="stable")
    expected, observed = probs[order] / probs.sum() * counts.sum(), counts[order]
    starts, pooled = [0], 0.0
    for index, number in enumerate(expected, start=1):
        pooled += number
        if pooled >= least_expected:
            starts.append(index)
            pooled = 0.0
    starts.pop()  # what is left over joins the last cell
    if len(starts) < 2:
        raise ValueError(f"{counts.sum()} draws fill {len(starts)} cells of {least_expected:g}: draw more")
    cells = np.add.reduceat(observed, starts), np.add.reduceat(expected, starts)
    return float(stats.chisquare(*cells).pvalue)
