"""Intervals of medians, and which of them differ."""

import math

import pytest

from loopmdm.speed.intervals import CONFIDENCE, apart, of_median, ratios


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (2, 1), (5, 1), (6, 1), (9, 2), (15, 4), (25, 8)])
def test_the_interval_is_the_narrowest_that_is_sure_enough(count, rank):
    values = [float(value) for value in range(1, count + 1)]
    median, low, high = of_median(values[::-1])
    assert (median, low, high) == ((count + 1) / 2, rank, count + 1 - rank)

    def missed(k):  # the true median lies below the k-th smallest or above the k-th largest
        return 2 * sum(math.comb(count, i) for i in range(k)) / 2**count

    if count >= 6:
        assert missed(rank) <= 1 - CONFIDENCE < missed(rank + 1)


def test_ratios_are_of_the_same_turn():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_intervals_that_touch_are_not_apart():
    assert not apart((2, 1, 3), (4, 3, 5)) and not apart((4, 3, 5), (2, 1, 3))
    assert apart((2, 1, 3), (5, 4, 6)) and apart((5, 4, 6), (2, 1, 3))
