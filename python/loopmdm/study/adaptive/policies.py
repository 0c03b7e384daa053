"""Rules for the number of loops on a trace: which loop each state stops at, and what that gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from loopmdm.exits import ArgmaxStable, ExitGate, ExitRule, HiddenChange, OutputChange
from loopmdm.exits.rules import LEAST_CHANGE
from loopmdm.model import flops
from loopmdm.study.kit.traces import Floats, Trace, bins_of

Stops = NDArray[np.int64]  # [N, J] in 1..K; 1 where there is no state


def fixed_stops(trace: Trace, num_loops: int) -> Stops:
    """The same number of loops in every state."""
    if not 1 <= num_loops <= trace.max_loops:
        raise ValueError(
            f"num_loops must be in 1..{trace.max_loops}, the loops of the trace, got {num_loops}"
        )
    return np.where(trace.there, num_loops, 1)


def table_stops(trace: Trace, loops: Sequence[int]) -> Stops:
    """Loops by place in the denoising, bins of equal width: what `ComputePlan.by_mask_ratio(loops)` runs."""
    table = np.asarray(loops)
    if table.ndim != 1 or not len(table) or table.min() < 1 or table.max() > trace.max_loops:
        raise ValueError(f"loops must be a list of 1..{trace.max_loops}, got {list(loops)}")
    stops: Stops = np.where(trace.there, table[bins_of(trace, len(table))], 1)
    return stops


def rule_stops(trace: Trace, rule: ExitRule, max_loops: int) -> Stops:
    """The first loop at which `rule` stops each state, `max_loops` at the latest.

    Raises:
        TypeError: the trace does not hold what the rule looks at.
    """
    if not 1 <= max_loops <= trace.max_loops:
        raise ValueError(
            f"max_loops must be in 1..{trace.max_loops}, the loops of the trace, got {max_loops}"
        )
    stop = _conditions(trace, rule)[:, :, :max_loops].copy()
    stop[:, :, -1] = True
    return np.where(trace.there, stop.argmax(2) + 1, 1)


def _conditions(trace: Trace, rule: ExitRule) -> NDArray[np.bool_]:
    """Whether the rule would stop after each loop, [N, J, K]."""
    if isinstance(rule, HiddenChange) and rule.threshold is not None:
        return np.asarray(trace.hidden_change < rule.eps)
    if isinstance(rule, OutputChange):
        return np.asarray(trace.output_change < rule.eps)
    if isinstance(rule, ArgmaxStable):
        stable = trace.flips == 0
        return np.asarray(np.all([_delayed(stable, loops) for loops in range(rule.patience)], axis=0))
    if isinstance(rule, ExitGate):
        features = torch.from_numpy(gate_features(trace)).flatten(0, 2)
        return (rule.stop_probability(features) >= rule.probability).numpy().reshape(trace.loss.shape)
    raise TypeError(f"a trace does not hold what {rule} looks at")


def _delayed(condition: NDArray[np.bool_], loops: int) -> NDArray[np.bool_]:
    """What held so many loops ago; nothing held before the first loop."""
    out = np.zeros_like(condition)
    out[:, :, loops:] = condition[:, :, : condition.shape[2] - loops]
    return out


def gate_features(trace: Trace) -> Floats:
    """`ExitGate.features` of every state after every loop, [N, J, K, 3]; NaN where there is no state."""
    loop = np.broadcast_to(np.log(np.arange(1, trace.max_loops + 1)), trace.loss.shape)
    share = np.broadcast_to(trace.share[:, :, None], trace.loss.shape)
    return np.stack([loop, share, np.log(np.maximum(trace.hidden_change, LEAST_CHANGE))], axis=3)


class Outcome(NamedTuple):
    """What stopping so gives each sequence, arrays [N]."""

    states: Floats
    loops: Floats  # summed over the states
    loss: Floats  # nats, summed over the states
    solved: Floats  # 1 if every digit is the most probable one; NaN for text


def outcome(trace: Trace, stops: Stops) -> Outcome:
    """The trace's sequences with each state stopped at its loop."""
    there = trace.there

    def at_stop(array: Floats, elsewhere: float) -> Floats:
        chosen = np.take_along_axis(array, stops[:, :, None] - 1, axis=2)[:, :, 0]
        return np.where(there, chosen, elsewhere)

    return Outcome(
        states=there.sum(1).astype(float),
        loops=np.where(there, stops, 0).sum(1).astype(float),
        loss=at_stop(trace.loss, 0.0).sum(1),
        solved=at_stop(trace.right, 1.0).min(1),
    )


def mixed_fixed(trace: Trace, mean_loops: float) -> Outcome:
    """Fixed loop counts at any mean: of the two neighbouring counts, each with its share of the sequences."""
    low = min(int(mean_loops), trace.max_loops - 1) if trace.max_loops > 1 else 1
    high = min(low + 1, trace.max_loops)
    weight = mean_loops - low if high > low else 0.0
    below, above = outcome(trace, fixed_stops(trace, low)), outcome(trace, fixed_stops(trace, high))
    return Outcome(*((1 - weight) * a + weight * b for a, b in zip(below, above, strict=True)))


def call_flops(
    trace: Trace, stops: Stops, rule: ExitRule | None, max_loops: int, dims: flops.Dimensions, length: int
) -> float:
    """FLOPs of a network call, in the mean over states: all blocks, and the head where a rule predicts.

    What the ledger of a run counts beside it, the rows that are drawn, is the same for every rule.
    """
    there = trace.there
    used = torch.from_numpy(stops[there])
    layers = dims.num_layers + (used.double() - 1) * (dims.loop_end - dims.loop_start)
    if rule is None:
        return float(layers.mean()) * length * flops.layer_flops(dims, length)
    cost = rule.cost(used, torch.full_like(used, max_loops), 1)
    layers += cost.tails * (dims.num_layers - dims.loop_end)
    rows = cost.projections * torch.from_numpy(trace.share[there]) * length
    blocks = float(layers.mean()) * length * flops.layer_flops(dims, length)
    return blocks + float(rows.mean()) * flops.head_flops(dims)
