"""Bootstrap over samples: how far a figure would move had other samples been drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap standard error and percentile interval."""

    value: float
    stderr: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap(
    statistic: Callable[..., Tensor], *columns: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """A function of the means of per-sample `columns` [N], with N the independent units that are resampled.

    Args:
        statistic: gets the mean of each column, scalars or tensors [resamples], and works elementwise.
        columns: float64 [N], N of at least 2.
        resamples: how many times N samples are drawn again, with replacement.
        seed: of these draws: the same for equal N, so that two figures may be compared resample by resample.
    """
    num = len(columns[0])
    if num < 2 or any(column.shape != (num,) for column in columns):
        raise ValueError(f"columns: got {[tuple(c.shape) for c in columns]}, expected [N] each, N at least 2")
    if resamples < 2:
        raise ValueError(f"resamples: got {resamples}, expected at least 2")
    drawn = torch.randint(0, num, (resamples, num), generator=torch.Generator().manual_seed(seed))
    values = statistic(*(column[drawn].mean(1) for column in columns))
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return Estimate(float(statistic(*(column.mean() for column in columns))), float(values.std()), low, high)
