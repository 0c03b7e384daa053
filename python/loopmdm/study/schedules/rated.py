"""Losses of many plans on the same sequences, and scores made of their means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from loopmdm.quality.bootstrap import Bootstrap, Floats, Interval


@dataclass(frozen=True)
class Rated:
    """Paired losses, [N, M]. A perplexity is exp of their mean, and compared by ratios.

    `boot` resamples the N sequences, for all plans at once.
    """

    losses: Floats
    perplexity: bool
    boot: Bootstrap

    @cached_property
    def point(self) -> Floats:
        """Scores of all plans, [M]."""
        return self._score(self.losses.mean(0))

    @cached_property
    def resampled(self) -> Floats:
        """Scores of all plans for each resample, [resamples, M]."""
        return self._score(self.boot.means(self.losses))

    def score(self, index: int) -> Interval:
        """The score of a plan."""
        return self.boot.interval(self.point[index], self.resampled[:, index])

    def over(self, index: int, other: int) -> Interval:
        """How much worse one plan is than another: a share, or a difference, which a score of 0 allows."""
        point, resampled = self.point, self.resampled
        if self.perplexity:
            return self.boot.interval(
                point[index] / point[other] - 1, resampled[:, index] / resampled[:, other] - 1
            )
        return self.boot.interval(point[index] - point[other], resampled[:, index] - resampled[:, other])

    def _score(self, means: Floats) -> Floats:
        return np.asarray(np.exp(means)) if self.perplexity else means
