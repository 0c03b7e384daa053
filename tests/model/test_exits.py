"""Exit rules: each stops where its definition says, costs what it says, and leaves other sequences alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.exits import ArgmaxStable, ExitGate, ExitRule, HiddenChange, OutputChange, make_rule
from loopmdm.model.stages import Stages

MASK, MOST = 22, 9


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "time"])
def model(request) -> LoopMDM:
    config = LoopMDMConfig(
        23,
        MASK,
        hidden_size=32,
        num_heads=4,
        num_layers=4,
        cond_dim=8,
        max_length=24,
        max_loops=5,
        gate_init=0.4,
        time_conditioning=request.param,
    )
    torch.manual_seed(0)
    made = LoopMDM(config).eval()
    with torch.no_grad():
        made.output_layer.linear.weight.normal_(0, 0.5)
        for name, value in made.named_parameters():
            if "adaLN" in name:
                value.add_(torch.randn_like(value) * 0.02)
    return made


def inputs(model: LoopMDM, chosen: slice | list[int] = slice(None)) -> dict[str, Any]:
    """Eight sequences with 0, 2, 4, .. masks."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, MASK, (8, 17), generator=generator)
    for row in range(8):
        tokens[row, torch.randperm(17, generator=generator)[: 2 * row]] = MASK
    sigma = torch.rand(8, generator=generator) if model.config.time_conditioning else None
    return {"input_ids": tokens[chosen], "sigma": None if sigma is None else sigma[chosen]}


def states(model: LoopMDM) -> tuple[Stages, list[Tensor]]:
    """The pass of all sequences, and H(0)..H(MOST)."""
    stages = model.stages(**inputs(model))
    hidden = [stages.before()]
    for _ in range(MOST):
        hidden.append(stages.loop(hidden[-1]))
    return stages, hidden


def predictions(model: LoopMDM, stages: Stages, hidden: Tensor) -> Tensor:
    """Log-probabilities [B, L, V - 1] in float64."""
    logits = lk.head_logits(stages.after(hidden), model.head(stages.sigma), compute_dtype=torch.float32)
    return logits[:, :, :MASK].double().log_softmax(dim=2)


def signal(rule: str, model: LoopMDM) -> Tensor:
    """What the rule compares after each loop, [MOST, B]: changes, or how many tokens changed."""
    stages, hidden = states(model)
    rows = []
    for before, after in pairwise(hidden):
        if rule.startswith("hidden"):
            where = stages.masked[..., None] if "masked" in rule else torch.ones(8, 17, 1, dtype=torch.bool)
            old, new = before.double() * where, after.double() * where
            base = old if "old" in rule else new
            if "tokens" in rule:
                ratios = (new - old).norm(dim=2) / base.norm(dim=2).clamp_min(1e-300)
                rows.append(ratios.sum(dim=1) / where.sum(dim=(1, 2)).clamp_min(1))
            else:
                ratio = (new - old).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1).clamp_min(1e-300)
                rows.append(ratio)
            continue
        p, q = (predictions(model, stages, h) for h in (after, before))
        if rule == "output":
            kl = (p.exp() * (p - q)).sum(dim=2) * stages.masked
            rows.append(kl.sum(dim=1) / stages.masked.sum(dim=1).clamp_min(1))
        else:
            rows.append(((p.argmax(dim=2) != q.argmax(dim=2)) & stages.masked).sum(dim=1).double())
    return torch.stack(rows)


def first_stop(stops: Tensor, min_loops: int) -> Tensor:
    """Loops used [B] where stops [MOST, B] says who may stop after each loop."""
    stops = stops.clone()
    stops[: min_loops - 1] = False
    return torch.where(stops.any(dim=0), stops.long().argmax(dim=0) + 1, MOST)


def between(values: Tensor, share: float) -> float:
    """A threshold in the middle of the widest gap near a quantile: rounding cannot decide."""
    ordered = values.flatten().sort().values
    near = ordered[int((share - 0.1) * ordered.numel()) : int((share + 0.1) * ordered.numel())]
    widest = int(near.diff().argmax())
    return float((near[widest] + near[widest + 1]) / 2)


def make_case(name: str, model: LoopMDM) -> tuple[ExitRule, Tensor]:
    """A rule, and who may stop after each loop [MOST, B] by its definition."""
    if name.startswith("argmax"):
        patience = int(name[-1])
        same = signal("argmax", model) == 0
        lasted = torch.zeros(8, dtype=torch.int64)
        stops = []
        for row in same:
            lasted = torch.where(row, lasted + 1, 0)
            stops.append(lasted >= patience)
        return ArgmaxStable(patience), torch.stack(stops)
    values = signal(name, model)
    eps = between(values[:, 1:], 0.4)
    if name == "output":
        return OutputChange(eps), values < eps
    if name == "gate":
        eps = between(signal("hidden", model), 0.4)
        return ExitGate((0.0, 0.0, -1.0), math.log(eps)), signal("hidden", model) <= eps
    words = name.split()
    options = {"denominator": "old" if "old" in words else "new"}
    options |= {"positions": "masked" if "masked" in words else "all"}
    options |= {"norm": "tokens" if "tokens" in words else "sequence"}
    return HiddenChange(eps, **options), values < eps


CASES = [
    "hidden",
    "hidden old",
    "hidden masked",
    "hidden tokens",
    "hidden old masked tokens",
    "output",
    "argmax 1",
    "argmax 2",
    "gate",
]


@pytest.mark.parametrize("min_loops", [1, 3])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_stops_where_the_definition_says(model, name, min_loops):
    rule, stops = make_case(name, model)
    out, used = model.hidden(**inputs(model), num_loops=MOST, exit=rule, min_loops=min_loops)
    expected = first_stop(stops, min_loops)
    assert len(set(expected.tolist())) > 1
    assert torch.equal(used, expected)
    assert torch.equal(out, model.hidden(**inputs(model), num_loops=used))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_sequence_alone_e13(model, name):
    """Bit for bit, unless noise levels are embedded: a product of one row may round otherwise."""
    rule, _ = make_case(name, model)
    out, used = model.hidden(**inputs(model), num_loops=MOST, exit=rule)
    close = {"rtol": 1e-4, "atol": 1e-4} if model.config.time_conditioning else {"rtol": 0, "atol": 0}
    for row in range(8):
        alone, loops = model.hidden(**inputs(model, [row]), num_loops=MOST, exit=rule)
        torch.testing.assert_close(alone, out[[row]], **close)
        assert loops.tolist() == used[[row]].tolist()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_each_sequence_has_its_own_most_loops(model, name):
    rule, stops = make_case(name, model)
    most = torch.tensor([9, 2, 3, 1, 9, 4, 2, 9])
    out, used = model.hidden(**inputs(model), num_loops=most, exit=rule)
    assert torch.equal(used, first_stop(stops, 1).minimum(most))
    assert torch.equal(out, model.hidden(**inputs(model), num_loops=used))


@pytest.mark.parametrize(
    "make", [HiddenChange, lambda eps: HiddenChange(eps, norm="tokens"), OutputChange], ids=["op", "py", "kl"]
)
@torch.no_grad()
def test_bounds_and_order_of_thresholds_e13(model, make):
    """0 is the cap, inf one loop (or min_loops), both bit for bit; loops fall as eps grows."""
    given = inputs(model)
    for eps, min_loops, expected in ((0.0, 1, MOST), (math.inf, 1, 1), (math.inf, 4, 4)):
        out, used = model.hidden(**given, num_loops=MOST, exit=make(eps), min_loops=min_loops)
        moved = given["input_ids"].eq(MASK).any(dim=1) | torch.tensor(expected < MOST or make is HiddenChange)
        assert (used == expected)[moved].all()
        assert torch.equal(out[moved], model.hidden(**given, num_loops=expected)[moved])
    loops = [model.hidden(**given, num_loops=MOST, exit=make(10.0**-e))[1] for e in range(5, -1, -1)]
    for tight, loose in pairwise(loops):
        assert (loose <= tight).all()
    assert (loops[-1] < loops[0]).any()


@pytest.mark.parametrize("min_loops", [1, 3])
@pytest.mark.parametrize("name", ["output", "argmax 1", "argmax 2"])
@torch.no_grad()
def test_cost_is_what_is_executed(model, name, min_loops, monkeypatch):
    rule, _ = make_case(name, model)
    tails, rows = [], []
    after = Stages.after
    monkeypatch.setattr(Stages, "after", lambda self, h: tails.append(len(h)) or after(self, h))
    for op, count in (
        ("head_logits", lambda h, head, **_: h.shape[0] * h.shape[1]),
        ("sample_rows", lambda h, head, rows, *_, **__: rows.numel()),
    ):
        real = getattr(lk, op)
        monkeypatch.setattr(
            lk, op, lambda *a, real=real, count=count, **k: rows.append(count(*a, **k)) or real(*a, **k)
        )
    for most in (torch.full((8,), MOST), torch.tensor([9, 4, 3, 3, 9, 4, 5, 9])):
        tails.clear(), rows.clear()
        _, used = model.hidden(**inputs(model), num_loops=most, exit=rule, min_loops=min_loops)
        cost = rule.cost(used, most, min_loops)
        masked = inputs(model)["input_ids"].eq(MASK).sum(dim=1)
        assert sum(tails) == 8 + int(cost.tails.sum())
        assert sum(rows) == int((cost.projections * masked).sum())


@torch.no_grad()
def test_gate_weighs_the_named_features(model):
    stages, hidden = states(model)
    features = ExitGate.features(stages, hidden[2], hidden[3], 3)
    assert ExitGate.FEATURES == ("log loop", "masked share", "log relative change")
    assert features.shape == (8, 3)
    torch.testing.assert_close(features[:, 0], torch.full((8,), math.log(3), dtype=torch.float64))
    torch.testing.assert_close(features[:, 1], torch.arange(8).double() * 2 / 17)
    torch.testing.assert_close(features[:, 2], signal("hidden", model)[2].log())
    gate = ExitGate((0.5, -1.0, 2.0), 0.25)
    by_hand = 1 / (1 + (-(features @ torch.tensor(gate.weights).double() + 0.25)).exp())
    torch.testing.assert_close(gate.stop_probability(features), by_hand)


RULES = [
    HiddenChange(0.1),
    HiddenChange(math.inf, "old", "masked", "tokens"),
    OutputChange(0.01),
    ArgmaxStable(3),
    ExitGate((1.0, 2.0, -3.0), 0.5, 0.7),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_are_data(rule):
    assert ExitRule.from_dict(rule.to_dict()) == rule
    assert len({rule, ExitRule.from_dict(rule.to_dict())}) == 1


def test_names_of_rules():
    assert make_rule("hidden", 0.1) == HiddenChange(0.1)
    assert make_rule("output", 0.1) == OutputChange(0.1)
    assert make_rule("argmax", None) == ArgmaxStable(1)
    assert make_rule(ArgmaxStable(2), None) == ArgmaxStable(2)
    assert str(HiddenChange(0.1, norm="tokens")) == "hidden eps=0.1 norm=tokens"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HiddenChange(-0.1), ValueError, "eps must be a number >= 0"),
        (lambda: HiddenChange(math.nan), ValueError, "eps"),
        (lambda: OutputChange("a"), ValueError, "eps"),
        (lambda: HiddenChange(0.1, "both"), ValueError, "denominator must be 'new' or 'old'"),
        (lambda: HiddenChange(0.1, positions="some"), ValueError, "positions"),
        (lambda: ArgmaxStable(0), ValueError, "patience must be at least 1"),
        (lambda: ArgmaxStable(1.5), TypeError, "patience"),
        (lambda: ArgmaxStable(True), TypeError, "patience"),
        (lambda: ExitGate((1.0,)), ValueError, "weights must be 3 finite numbers"),
        (lambda: ExitGate((1.0, math.nan, 0.0)), ValueError, "weights"),
        (lambda: ExitGate((1.0, 1.0, 0.0), probability=2), ValueError, "probability"),
        (lambda: ExitRule.from_dict({"rule": "never"}), ValueError, "'never', accepted are hidden, output"),
        (lambda: ExitRule.from_dict({"rule": "argmax", "eps": 1}), ValueError, "not an exit rule 'argmax'"),
        (lambda: make_rule("output", None), ValueError, "needs a threshold eps"),
        (lambda: make_rule(RULES[2], 0.1), ValueError, "eps does not go with"),
        (lambda: make_rule("norm", 0.1), ValueError, "criterion must be"),
    ],
)
def test_bad_rules_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exit": 0.1}, TypeError, "exit must be an ExitRule"),
        ({"exit": RULES[0], "min_loops": 0}, ValueError, r"min_loops must be in 1\.\.4"),
        ({"exit": RULES[0], "min_loops": 5}, ValueError, r"min_loops must be in 1\.\.4"),
        ({"exit": RULES[2], "min_loops": True}, TypeError, "min_loops must be an int"),
    ],
)
def test_bad_options_are_named(model, options, error, message):
    with pytest.raises(error, match=message):
        model.hidden(**inputs(model), num_loops=4, **options)


def test_patience_may_be_numpys():
    rule = ArgmaxStable(np.int64(2))
    assert rule == ArgmaxStable(2) and type(rule.patience) is int
    assert ExitRule.from_dict(rule.to_dict()) == rule
