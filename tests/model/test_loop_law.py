"""Stochastic loop counts (E11): the laws, their histograms, and that a draw depends on (seed, step) only."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from loopmdm.model.loop_law import LoopLaw

SMALL = SimpleNamespace(
    hidden_size=768,
    num_layers=12,
    mlp_ratio=4,
    cond_dim=128,
    vocab_size=50258,
    loop_start=1,
    loop_end=3,
    max_loops=12,
)
LAWS = {
    "uniform": LoopLaw.uniform(12),
    "poisson": LoopLaw.poisson(12),
    "poisson:3": LoopLaw.parse("poisson:3", 8),
    "flops": LoopLaw.parse("flops", 12, dims=SMALL, length=1024),
}
UNIFORM_12_SEED_7 = [3, 7, 12, 6, 5, 3, 2, 2, 5, 7, 10, 5]


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
@pytest.mark.parametrize("name", LAWS)
def test_e11_histogram(name: str, seed: int) -> None:
    law = LAWS[name]
    draws = Counter(law.sample(seed, step) for step in range(10_000))
    expected = 10_000 * np.array(law.probabilities)
    observed = [draws[s] for s in range(1, law.largest + 1)]
    assert sum(observed) == 10_000
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_e11_successive_draws_are_independent() -> None:
    law = LoopLaw.uniform(6)
    draws = [law.sample(3, step) for step in range(20_001)]
    pairs = np.zeros((6, 6))
    for a, b in itertools.pairwise(draws):
        pairs[a - 1, b - 1] += 1
    assert stats.chi2_contingency(pairs).pvalue > 0.01
    other_seed = [law.sample(4, step) for step in range(20_001)]
    assert np.mean(np.equal(draws, other_seed)) == pytest.approx(1 / 6, abs=0.01)


def test_e11_same_draw_in_every_process() -> None:
    """Golden values, so that a resumed run continues with the same loop counts on any machine and numpy."""
    draws = "[LoopLaw.uniform(12).sample(7, s) for s in range(12)]"
    code = f"from loopmdm.model.loop_law import LoopLaw; print({draws})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    law = LoopLaw.uniform(12)
    assert out.strip() == str([law.sample(7, step) for step in range(12)]) == str(UNIFORM_12_SEED_7)


def test_means() -> None:
    assert LAWS["uniform"].mean == pytest.approx(6.5)
    assert LAWS["flops"].mean == pytest.approx(5.72, abs=0.005)
    assert LoopLaw.fixed(4).mean == 4
    assert LoopLaw.parse("flops", 12, dims=SMALL, length=1024, convention="blocks").mean < LAWS["flops"].mean


def test_poisson_is_huginns_law() -> None:
    """Moments where the bound does not bind (mean rbar + 1), and a Monte Carlo of the definition."""
    law = LoopLaw.poisson(400, rbar=6.0)
    loops = np.arange(1, 401)
    p = np.array(law.probabilities)
    assert law.mean == pytest.approx(7.0, rel=1e-12)
    assert p @ (loops - 7.0) ** 2 == pytest.approx(6 + 36 * np.expm1(0.25), rel=1e-9)
    rng = np.random.default_rng(0)
    n = 100_000
    draws = rng.poisson(np.exp(rng.normal(np.log(6.0) - 0.125, 0.5, n))) + 1
    observed = np.bincount(draws, minlength=32)[1:31]
    expected = n * p[:30]
    observed = np.append(observed, n - observed.sum())
    assert stats.chisquare(observed, np.append(expected, n - expected.sum())).pvalue > 0.01


def test_poisson_is_conditioned_not_clipped() -> None:
    free, bounded = LoopLaw.poisson(400, rbar=6.5), LoopLaw.poisson(12)
    assert bounded.spec == "poisson:6.5"
    assert bounded.largest == 12
    ratio = np.array(free.probabilities[:12]) / np.array(bounded.probabilities)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert LoopLaw.poisson(1000, rbar=500).mean < 501


@pytest.mark.parametrize("law", [*LAWS.values(), LoopLaw.fixed(24)], ids=lambda law: law.spec)
def test_spec_round_trip(law: LoopLaw) -> None:
    assert LoopLaw.parse(law.spec, law.largest, dims=SMALL, length=1024) == law


def test_fixed_law_always_gives_its_count() -> None:
    law = LoopLaw.parse("fixed:24", 12)
    assert {law.sample(seed, step) for seed in range(5) for step in range(50)} == {24}
    assert {LoopLaw.uniform(1).sample(0, step) for step in range(50)} == {1}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifrom", "'unifrom'; accepted: 'uniform'"),
        ("uniform:3", "'uniform:3'; accepted"),
        ("fixed", "'' is not a number"),
        ("fixed:x", "'x' is not a number"),
        ("fixed:0", "S of the loop law 'fixed:0' must be at least 1, got 0"),
        ("fixed:-2", "S of the loop law 'fixed:-2' must be at least 1, got -2"),
        ("poisson:0", "rbar of the poisson law is 0.0"),
        ("poisson:nan", "rbar of the poisson law is nan"),
        ("flops", "needs dims and length"),
    ],
)
def test_bad_spec(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopLaw.parse(spec, 12)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="max_loops must be at least 1, got 0"):
        LoopLaw.uniform(0)
    with pytest.raises(TypeError, match=r"max_loops must be an int, got 2\.5"):
        LoopLaw.uniform(2.5)
    with pytest.raises(TypeError, match="loop law is a int"):
        LoopLaw.parse(3, 12)
    with pytest.raises(ValueError, match="step is -1"):
        LoopLaw.uniform(3).sample(0, -1)
    with pytest.raises(ValueError, match="seed is"):
        LoopLaw.uniform(3).sample(2**64, 0)
    with pytest.raises(ValueError, match="sum to 1"):
        LoopLaw("mine", (0.5, 0.4))
