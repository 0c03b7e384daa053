"""The bootstrap against brute force, against known laws, and its pairing."""

from __future__ import annotations

import numpy as np
import pytest

from loopmdm.quality.bootstrap import Bootstrap


def test_resampled_ratios_are_those_of_resampled_units() -> None:
    generator = np.random.default_rng(0)
    numerator, denominator = generator.normal(size=(7, 3)), generator.uniform(1, 2, size=(7, 3))
    bootstrap = Bootstrap(7, resamples=50, seed=3)
    draws = np.random.default_rng(3).multinomial(7, np.full(7, 1 / 7), size=50)
    expected = []
    for counts in draws:
        chosen = np.repeat(np.arange(7), counts)
        expected.append(numerator[chosen].sum(0) / denominator[chosen].sum(0))
    np.testing.assert_allclose(bootstrap.ratios(numerator, denominator), expected, rtol=1e-12)
    interval = bootstrap.ratio(numerator, denominator)
    np.testing.assert_allclose(interval.value, numerator.sum(0) / denominator.sum(0))
    np.testing.assert_allclose(interval.low, np.quantile(expected, 0.025, axis=0))
    np.testing.assert_allclose(interval.high, np.quantile(expected, 0.975, axis=0))


def test_intervals_cover_the_mean() -> None:
    generator = np.random.default_rng(1)
    samples = generator.exponential(size=(100, 400))  # 400 columns: 400 experiments of 100 units
    interval = Bootstrap(100, resamples=1000, seed=1).mean(samples)
    covered = (interval.low < 1) & (interval.high > 1)
    assert (
        0.90 < covered.mean() < 0.97
    )  # nominal 0.95; the percentile interval of a skewed law is a bit short
    width = (interval.high - interval.low).mean()
    assert width == pytest.approx(2 * 1.96 / 10, rel=0.05)


def test_estimates_of_one_bootstrap_are_paired() -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(size=50)
    bootstrap = Bootstrap(50, seed=0)
    shifted = bootstrap.means(base + 0.25) - bootstrap.means(base)
    np.testing.assert_allclose(shifted, 0.25, rtol=1e-12)
    doubled = bootstrap.function(base, lambda mean: np.exp(2 * mean))
    low = np.quantile(np.exp(2 * bootstrap.means(base)), 0.025)
    assert doubled.value == pytest.approx(np.exp(2 * base.mean())) and doubled.low == pytest.approx(low)
    np.testing.assert_array_equal(Bootstrap(50, seed=0).means(base), bootstrap.means(base))


def test_empty_denominators_are_left_out() -> None:
    interval = Bootstrap(3, resamples=200).ratio(
        [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [[1, 0], [1, 0], [1, 1]]
    )
    assert np.isfinite(interval.low).all() and interval.value.tolist() == [1.0, 3.0]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="units and resamples"):
        Bootstrap(0)
    with pytest.raises(ValueError, match="level"):
        Bootstrap(2, level=1.0)
    with pytest.raises(ValueError, match=r"values: got shape \[3\]"):
        Bootstrap(2).mean([1.0, 2.0, 3.0])
