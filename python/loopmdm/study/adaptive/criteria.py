"""Criteria for the number of loops at many settings: chosen on one half of a trace, judged on the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loopmdm.exits import ArgmaxStable, ExitRule, HiddenChange, OutputChange
from loopmdm.model.flops import Dimensions
from loopmdm.plan import ComputePlan
from loopmdm.quality.bootstrap import Bootstrap, Interval
from loopmdm.study.adaptive.gates import fit_gate
from loopmdm.study.adaptive.policies import (
    Outcome,
    Stops,
    call_flops,
    fixed_stops,
    mixed_fixed,
    outcome,
    rule_stops,
    table_stops,
)
from loopmdm.study.adaptive.tables import best_tables, bin_losses
from loopmdm.study.kit.traces import Floats, Trace, bins_of

FIXED, TABLE = "fixed S", "table S(t)"
HIDDEN, OUTPUT, ARGMAX, GATE = "hidden change", "output change", "argmax stable", "exit gate"
_HIDDEN_EPS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.17, 0.15, 0.13, 0.11, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05)
_OUTPUT_EPS = (0.3, 0.1, 0.05, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
_PATIENCE = (1, 2, 3)
_PROBABILITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
_TABLE_SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)  # of the cap
# Quality is equal to the cap's within so much: a share of the boards, a share of the NELBO. Settings are
# chosen within half of it, since the sequences they are chosen on flatter them.
SOLVED_MARGIN, NLL_MARGIN = 0.01, 0.005


class Policy(NamedTuple):
    """One criterion with one setting. `rule` is None where the state itself has no say."""

    criterion: str
    setting: str
    plan: ComputePlan
    rule: ExitRule | None

    @property
    def name(self) -> str:
        return f"{self.criterion} {self.setting}"

    def stops(self, trace: Trace, cap: int) -> Stops:
        """Where it stops each state of a trace."""
        if self.rule is not None:
            return rule_stops(trace, self.rule, cap)
        if self.criterion == FIXED:
            return fixed_stops(trace, self.loops[0])
        return table_stops(trace, self.loops)

    @property
    def loops(self) -> list[int]:
        """The loop counts that a plan without a rule names, one for each part of its setting."""
        return [int(loops) for loops in self.setting.split(",")]


def catalogue(choosing: Trace, cap: int, bins: int) -> list[Policy]:
    """Every criterion at every setting; the gate and the tables are fitted to `choosing`."""
    gate = fit_gate(choosing, cap)
    rules: list[tuple[str, str, ExitRule]] = [
        *((HIDDEN, f"eps={eps:g}", HiddenChange(eps)) for eps in _HIDDEN_EPS),
        *((OUTPUT, f"eps={eps:g}", OutputChange(eps)) for eps in _OUTPUT_EPS),
        *((ARGMAX, f"patience={p}", ArgmaxStable(p)) for p in _PATIENCE if p < cap),
        *((GATE, f"p={p:g}", dataclasses.replace(gate, probability=p)) for p in _PROBABILITIES),
    ]
    losses, states = bin_losses(choosing, bins)
    budgets = [max(1.0, share * cap) for share in _TABLE_SHARES]
    tables = dict.fromkeys(best_tables(losses[:, :cap], states, budget)[0].loops for budget in budgets)
    return [
        *(Policy(FIXED, str(s), ComputePlan.constant(s), None) for s in range(1, cap + 1)),
        *(
            Policy(name, setting, ComputePlan.adaptive(criterion=rule, max_loops=cap), rule)
            for name, setting, rule in rules
        ),
        *(
            Policy(TABLE, ",".join(map(str, loops)), ComputePlan.by_mask_ratio(loops), None)
            for loops in tables
        ),
    ]


def quality(result: Outcome) -> tuple[Floats, float]:
    """Quality of each sequence [N] and its sign, 1 if more is better: boards solved, or the NELBO."""
    if np.isnan(result.solved).any():
        return result.loss, -1.0
    return result.solved, 1.0


def choose(policies: Sequence[Policy], choosing: Trace, cap: int) -> list[Policy]:
    """Of each criterion the setting of fewest loops that is as good as the cap here, if there is one."""
    at_cap, sign = quality(outcome(choosing, fixed_stops(choosing, cap)))
    margin = _margin(at_cap, sign) / 2
    best: dict[str, tuple[float, Policy]] = {}
    for policy in policies:
        result = outcome(choosing, policy.stops(choosing, cap))
        loops = float(result.loops.sum() / result.states.sum())
        if sign * (quality(result)[0].mean() - at_cap.mean()) < -margin:
            continue
        if policy.criterion not in best or loops < best[policy.criterion][0]:
            best[policy.criterion] = loops, policy
    return [policy for _, policy in best.values()]


class Judge:
    """Rows of the table: what policies give on the half that no setting was chosen on."""

    def __init__(self, trace: Trace, cap: int, dims: Dimensions, length: int, seed: int) -> None:
        self._trace, self._cap, self._dims, self._length = trace, cap, dims, length
        self._boot = Bootstrap(len(trace.share), seed=seed)
        at_cap = fixed_stops(trace, cap)
        self._at_cap, self.sign = quality(outcome(trace, at_cap))
        self._cap_flops = call_flops(trace, at_cap, None, cap, dims, length)

    def row(self, policy: Policy) -> dict[str, Any]:
        """Mean loops, quality, FLOPs, and the gains (more is better) over the cap and over fixed counts."""
        trace = self._trace
        stops = policy.stops(trace, self._cap)
        result = outcome(trace, stops)
        value, _ = quality(result)
        loops = self._boot.ratio(result.loops, result.states)
        at_equal_loops, _ = quality(mixed_fixed(trace, float(loops.value)))
        spent = call_flops(trace, stops, policy.rule, self._cap, self._dims, self._length)
        return {
            "part": "quality",
            "criterion": policy.criterion,
            "setting": policy.setting,
            "measure": "share of boards solved" if self.sign > 0 else "NELBO (nats per token)",
            **_columns("mean_loops", loops),
            "loops_saved": 1 - float(loops.value) / self._cap,
            **_columns("value", self._boot.mean(value)),
            **_columns("gain_over_cap", self._boot.mean(self.sign * (value - self._at_cap))),
            **_columns("gain_over_fixed", self._boot.mean(self.sign * (value - at_equal_loops))),
            "call_flops": spent,
            "flops_saved": 1 - spent / self._cap_flops,
        }

    def within_margin(self, row: dict[str, Any]) -> bool:
        """Whether the row's quality equals the cap's, within the margin."""
        return float(row["gain_over_cap"]) >= -self.margin

    @property
    def margin(self) -> float:
        """Within which qualities are equal."""
        return _margin(self._at_cap, self.sign)

    def allocation(self, policy: Policy, bins: int) -> list[dict[str, Any]]:
        """Mean loops in bins of the denoising, the fully masked end first."""
        trace = self._trace
        stops, where = policy.stops(trace, self._cap), bins_of(trace, bins)
        rows = []
        for index in range(bins):
            inside = trace.there & (where == index)
            if not inside.any():
                continue
            loops = self._boot.ratio(np.where(inside, stops, 0).sum(1), inside.sum(1))
            rows.append(
                {
                    "part": "loops against t",
                    "criterion": policy.criterion,
                    "setting": policy.setting,
                    "t": round(1 - (index + 0.5) / bins, 6),
                    **_columns("mean_loops", loops),
                }
            )
        return rows


def _margin(at_cap: Floats, sign: float) -> float:
    return SOLVED_MARGIN if sign > 0 else NLL_MARGIN * float(at_cap.mean())


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return {
        name: float(interval.value),
        f"{name}_low": float(interval.low),
        f"{name}_high": float(interval.high),
    }
