"""The search of S(t) tables, against all tables there are; and the fit of the exit gate."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from loopmdm.exits import ExitGate
from loopmdm.study.adaptive.gates import fit_gate, logistic_regression
from loopmdm.study.adaptive.policies import gate_features, outcome, rule_stops, table_stops
from loopmdm.study.adaptive.tables import best_tables, bin_losses
from loopmdm.study.kit.traces import Trace


@pytest.mark.parametrize("mean_loops", [1.0, 1.4, 2.0, 2.6, 4.0, 9.0])
def test_the_best_tables_are_those_of_a_full_search(mean_loops: float) -> None:
    generator = np.random.default_rng(3)
    losses = generator.random((5, 4)).cumsum(1)[:, ::-1]
    states = np.array([2.0, 1.0, 0.5, 3.0, 1.5])
    allowed = []
    for loops in product(range(1, 5), repeat=5):
        mean = np.dot(loops, states) / states.sum()
        if mean <= mean_loops + 1e-9:
            allowed.append((sum(losses[b, s - 1] for b, s in enumerate(loops)), loops, mean))
    allowed.sort()
    found = best_tables(losses, states, mean_loops, 3)
    assert [table.loops for table in found] == [loops for _, loops, _ in allowed[:3]]
    for table, (loss, _, mean) in zip(found, allowed, strict=False):
        assert table.loss == pytest.approx(loss) and table.mean_loops == pytest.approx(mean)


def test_more_loops_are_left_out_where_they_harm() -> None:
    (table,) = best_tables([[1.0, 2.0], [2.0, 1.0]], [1.0, 1.0], 2.0)
    assert table == ((1, 2), 2.0, 1.5)


def test_bad_tables() -> None:
    with pytest.raises(ValueError, match=r"do not fit: got \[2, 3\] and \[3\]"):
        best_tables(np.zeros((2, 3)), np.ones(3), 2.0)
    with pytest.raises(ValueError, match=r"mean_loops must be at least 1, got 0\.5"):
        best_tables(np.zeros((2, 3)), np.ones(2), 0.5)


def trace_of(gain: np.ndarray) -> Trace:
    """States [N, J] that need so many loops, up to 5; loss and change are gone from then on."""
    needs = gain[:, :, None]
    loop = np.arange(1, 6)
    place = np.broadcast_to((np.arange(gain.shape[1]) + 0.5) / gain.shape[1], gain.shape)
    loss = np.maximum(needs - loop, 0.0)
    change = np.where(loop < needs, 0.5, 0.01) * np.ones_like(loss)
    return Trace(
        place.copy(), 1 - place, loss, (loss == 0).astype(float), change, change, np.zeros_like(loss)
    )


def test_a_table_knows_which_part_needs_the_loops() -> None:
    trace = trace_of(np.tile([5, 4, 2, 1], (6, 1)))
    losses, states = bin_losses(trace, 4)
    assert losses[0].tolist() == [4, 3, 2, 1, 0] and states.tolist() == [1, 1, 1, 1]
    (table,) = best_tables(losses, states, 3.0)
    assert table.loops == (5, 4, 2, 1) and table.loss == 0
    assert outcome(trace, table_stops(trace, table.loops)).solved.all()


def test_logistic_regression_meets_its_equations() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, -3.0]
    truth = np.array([1.0, -0.2, 15.0])
    y = generator.random(400) < 1 / (1 + np.exp(-(x @ truth + 46.0)))
    weights = logistic_regression(x, y)
    residual = 1 / (1 + np.exp(-(x @ weights[:-1] + weights[-1]))) - y
    # The likelihood's gradient, in units of each feature, is what the ridge asks for.
    scaled = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(scaled.T @ residual, -1e-3 * 400 * weights[:-1] * x.std(0), atol=1e-6)
    assert abs(residual.sum()) < 1e-6
    assert np.isfinite(logistic_regression([[0.0], [1.0]], [False, True])).all()
    with pytest.raises(ValueError, match=r"do not fit: got \[2, 1\], \[3\]"):
        logistic_regression([[0.0], [1.0]], [0, 1, 1])


def test_the_gate_stops_when_nothing_is_to_gain() -> None:
    needs = np.random.default_rng(1).integers(1, 6, size=(40, 4))
    trace = trace_of(needs)
    gate = fit_gate(trace[:20], 5)
    assert isinstance(gate, ExitGate) and len(gate.weights) == len(ExitGate.FEATURES)
    stops = rule_stops(trace[20:], gate, 5)
    assert (stops == needs[20:]).all()
    assert gate_features(trace).shape == (40, 4, 5, 3)
    with pytest.raises(ValueError, match=r"max_loops must be in 2\.\.5, the loops of the trace, got 1"):
        fit_gate(trace, 1)
    with pytest.raises(ValueError, match="tolerance must be a number of at least 0, got -1"):
        fit_gate(trace, 5, tolerance=-1)
