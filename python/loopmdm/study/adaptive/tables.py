"""S(t) tables: the loops of each part of the denoising that lose least within a budget of mean loops."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopmdm.study.kit.traces import Floats, Trace, bins_of

# The budget is cut into so many parts, and costs are rounded up to whole ones: no table exceeds the budget,
# and what the rounding forbids is below a hundredth of a loop.
_PARTS = 4096


class Table(NamedTuple):
    """Loops of each bin, the fully masked end first, with the loss they add up to and their mean."""

    loops: tuple[int, ...]
    loss: float
    mean_loops: float


def bin_losses(trace: Trace, bins: int) -> tuple[Floats, Floats]:
    """Loss of each bin at each loop count [bins, K], and its states [bins], in the mean of a sequence."""
    there = trace.there
    which = bins_of(trace, bins)[there]
    losses = np.zeros((bins, trace.max_loops))
    np.add.at(losses, which, trace.loss[there])
    states = np.bincount(which, minlength=bins).astype(float)
    return losses / len(trace.share), states / len(trace.share)


def best_tables(losses: ArrayLike, states: ArrayLike, mean_loops: float, count: int = 1) -> list[Table]:
    """The `count` tables of least total loss whose mean loops stay within `mean_loops`, best first.

    An exact search (a knapsack by dynamic programming), since the losses of the bins add up.

    Args:
        losses: [bins, K] of each bin at 1..K loops.
        states: [bins] how often each bin is run.
        mean_loops: over all states.
    """
    loss, weight = np.asarray(losses, dtype=float), np.asarray(states, dtype=float)
    if loss.ndim != 2 or weight.shape != loss.shape[:1] or not weight.sum() > 0 or weight.min() < 0:
        raise ValueError(
            f"losses [bins, K] and states [bins] do not fit: got {list(loss.shape)} and {list(weight.shape)}"
        )
    most = loss.shape[1]
    if not mean_loops >= 1:
        raise ValueError(f"mean_loops must be at least 1, got {mean_loops}")
    total = weight.sum()
    budget = min(mean_loops, most) * total
    # Every bin runs once anyway: the parts pay for further loops.
    part = max(budget - total, 0.0) / _PARTS or 1.0
    extra = np.ceil(np.arange(most)[None] * weight[:, None] / part - 1e-9).astype(np.int64)
    parts = _PARTS if budget > total else 0
    # best[c, m]: m-th least loss of the bins so far at a cost of c parts; chosen and source lead back.
    best = np.full((parts + 1, count), np.inf)
    best[0, 0] = 0.0
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for loss_of_bin, costs in zip(loss, extra, strict=True):
        candidates = np.full((parts + 1, most, count), np.inf)
        for choice, cost in enumerate(costs.tolist()):
            if cost <= parts:
                candidates[cost:, choice] = best[: parts + 1 - cost] + loss_of_bin[choice]
        flat = candidates.reshape(parts + 1, -1)
        order = flat.argsort(1, kind="stable")[:, :count]
        best = np.take_along_axis(flat, order, 1)
        trail.append((order // count, order % count))
    finished = np.argsort(best, axis=None, kind="stable")
    tables = []
    for number in finished[:count].tolist():
        spent, rank = divmod(number, count)
        if not np.isfinite(best[spent, rank]):
            break
        loops = []
        value = float(best[spent, rank])
        for costs, (chosen, source) in zip(extra[::-1], trail[::-1], strict=True):
            choice = int(chosen[spent, rank])
            loops.append(choice + 1)
            spent, rank = spent - int(costs[choice]), int(source[spent, rank])
        table = np.array(loops[::-1])
        tables.append(Table(tuple(table.tolist()), value, float(table @ weight / total)))
    return tables
