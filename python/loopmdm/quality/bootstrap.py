"""Percentile bootstrap over independent units (sequences, boards, samples)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """Estimates and the ends of their intervals, arrays of one shape."""

    value: Floats
    low: Floats
    high: Floats


class Bootstrap:
    """Resamples of `units`, drawn once: everything estimated from one `Bootstrap` is paired.

    A difference, a ratio or an argmax of estimates therefore has an interval by applying the same function
    to the estimates and to their resamples (`interval`).
    """

    def __init__(self, units: int, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> None:
        if units < 1 or resamples < 1:
            raise ValueError(f"units and resamples must be at least 1, got {units} and {resamples}")
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        self.units = units
        self.level = level
        generator = np.random.default_rng(seed)
        # How often each unit is drawn: [resamples, units].
        self._counts = generator.multinomial(units, np.full(units, 1 / units), size=resamples).astype(float)

    def ratios(self, numerator: ArrayLike, denominator: ArrayLike) -> Floats:
        """sum(numerator) / sum(denominator) over the units [N, ...], for each resample: [resamples, ...].

        NaN where a denominator is 0.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sums(numerator) / self._sums(denominator)

    def means(self, values: ArrayLike) -> Floats:
        """Mean over the units [N, ...] for each resample, [resamples, ...]."""
        return self._sums(values) / self.units

    def ratio(self, numerator: ArrayLike, denominator: ArrayLike) -> Interval:
        """sum(numerator) / sum(denominator) over the units [N, ...] with its interval."""
        top, bottom = self._checked(numerator).sum(0), self._checked(denominator).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.interval(top / bottom, self.ratios(numerator, denominator))

    def mean(self, values: ArrayLike) -> Interval:
        """Mean over the units [N, ...] with its interval. Differences of paired values are values."""
        return self.interval(self._checked(values).mean(0), self.means(values))

    def function(self, values: ArrayLike, function: Callable[[Floats], Floats]) -> Interval:
        """function(means) with its interval; `function` keeps a leading axis of resamples."""
        point = function(self._checked(values).mean(0)[None])[0]
        return self.interval(point, function(self.means(values)))

    def interval(self, value: ArrayLike, resampled: Floats) -> Interval:
        """The interval around an estimate, from its resamples along the first axis; NaN are left out."""
        tail = (1 - self.level) / 2
        with np.errstate(invalid="ignore"):
            if np.isnan(resampled).any():
                low, high = np.nanquantile(resampled, [tail, 1 - tail], axis=0)
            else:
                low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
        return Interval(np.asarray(value, dtype=float), np.asarray(low), np.asarray(high))

    def _sums(self, values: ArrayLike) -> Floats:
        array = self._checked(values)
        flat = self._counts @ array.reshape(self.units, -1)
        return flat.reshape(len(flat), *array.shape[1:])

    def _checked(self, values: ArrayLike) -> Floats:
        array = np.asarray(values, dtype=float)
        if array.ndim < 1 or array.shape[0] != self.units:
            raise ValueError(
                f"values: got shape {list(array.shape)}, expected [{self.units}, ...], one a unit"
            )
        return array
