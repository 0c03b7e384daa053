"""An exit gate fitted after training: a logistic function that knows from cheap features when to stop."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopmdm.exits import ExitGate
from loopmdm.study.adaptive.policies import gate_features
from loopmdm.study.kit.traces import Floats, Trace

_RIDGE = 1e-3  # keeps the weights finite where the classes can be told apart
_STEPS = 50


def fit_gate(trace: Trace, max_loops: int, *, tolerance: float = 0.01) -> ExitGate:
    """The gate that predicts that no later loop, up to `max_loops`, lowers a state's loss any more.

    Args:
        trace: of sequences kept for the purpose.
        tolerance: share of the mean loss of a state after one loop that does not count as a gain.
    """
    if not 2 <= max_loops <= trace.max_loops:
        raise ValueError(
            f"max_loops must be in 2..{trace.max_loops}, the loops of the trace, got {max_loops}"
        )
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance must be a number of at least 0, got {tolerance}")
    there = trace.there
    loss = trace.loss[there][:, :max_loops]
    least_from_here = np.minimum.accumulate(loss[:, ::-1], axis=1)[:, ::-1]
    done = loss - least_from_here <= tolerance * loss[:, 0].mean()
    # At the last loop there is nothing to decide.
    features = gate_features(trace)[there][:, : max_loops - 1]
    weights = logistic_regression(features.reshape(-1, features.shape[-1]), done[:, :-1].reshape(-1))
    return ExitGate(tuple(weights[:-1].tolist()), float(weights[-1]))


def logistic_regression(features: ArrayLike, labels: ArrayLike) -> Floats:
    """Weights [F + 1], the bias last, of greatest likelihood less a small ridge: Newton's method.

    features: [N, F]; labels: [N] bool.
    """
    x, y = np.asarray(features, dtype=float), np.asarray(labels, dtype=float)
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
        raise ValueError(f"features [N, F] and labels [N] do not fit: got {list(x.shape)}, {list(y.shape)}")
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    design = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    weights = np.zeros(design.shape[1])
    penalty = _RIDGE * len(x) * np.eye(len(weights))
    penalty[-1, -1] = 0.0
    for _ in range(_STEPS):
        probability = _sigmoid(design @ weights)
        gradient = design.T @ (probability - y) + penalty @ weights
        curvature = (design.T * (probability * (1 - probability) + 1e-9)) @ design + penalty
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    slopes = weights[:-1] / scale
    return np.append(slopes, weights[-1] - slopes @ mean)


def _sigmoid(x: NDArray[np.float64]) -> Floats:
    return np.where(x >= 0, 1.0, np.exp(-np.abs(x))) / (1.0 + np.exp(-np.abs(x)))
