"""Compute plans: grammar, bookkeeping, JSON, and that the sampler runs what the plan says."""

from __future__ import annotations

import pytest
import torch

from loopmdm import ComputePlan, sample
from loopmdm.plan import StepCompute, as_plan


def loops_per_step(plan: ComputePlan, steps: int) -> list[int | None]:
    return [plan.at(step, steps).num_loops for step in range(steps)]


@pytest.mark.parametrize("text", ["L125,H750,L125", "(L125,H750,L125)", " ( L125, H750 ,L125 ) "])
def test_grammar_e14(text):
    plan = ComputePlan.parse(text, light=4, heavy=12)
    assert plan.num_steps == 1000
    loops = loops_per_step(plan, 1000)
    assert loops == [4] * 125 + [12] * 750 + [4] * 125
    assert str(plan) == "(L125,H750,L125) H=12 L=4"


def test_loop_segments_are_the_same_schedule():
    plan = ComputePlan.parse("(S2:125,S12:750,S2:125)")
    assert loops_per_step(plan, 1000) == [2] * 125 + [12] * 750 + [2] * 125
    assert str(plan) == "(S2:125,S12:750,S2:125)"
    assert plan == ComputePlan.parse(str(plan)) == ComputePlan.table([2] * 125 + [12] * 750 + [2] * 125)
    mixed = ComputePlan.parse("L2,S7:1,H2", light=1, heavy=3)
    assert loops_per_step(mixed, 5) == [1, 1, 7, 3, 3]


def test_index_0_is_the_masked_end(make_fixed):
    model = make_fixed(torch.zeros(5, 3))
    sample(model, 1, order="left_to_right", plan=ComputePlan.parse("L1,H3,L1", light=1, heavy=4))
    assert [call["num_loops"] for call in model.calls] == [1, 4, 4, 4, 1]
    assert (model.calls[0]["tokens"] == model.config.mask_token_id).all()


def test_plan_sets_the_number_of_steps(make_fixed):
    out = sample(make_fixed(torch.zeros(5, 3)), 1, plan=ComputePlan.parse("S1:30,S2:20"))
    assert out.num_steps == 50


def test_one_letter_plans_equal_plain_sampling_e14(model, make_model):
    light = make_model(num_layers=3, hidden_size=8)
    arguments = {"num_samples": 3, "length": 12, "steps": 12, "seed": 4}
    heavy_only = sample(model, plan=ComputePlan.parse("H12", light=light, heavy=model), **arguments)
    assert torch.equal(heavy_only.tokens, sample(model, **arguments).tokens)
    light_only = sample(model, plan=ComputePlan.parse("L12", light=light, heavy=model), **arguments)
    assert torch.equal(light_only.tokens, sample(light, **arguments).tokens)
    mixed = sample(model, plan=ComputePlan.parse("L4,H4,L4", light=light, heavy=model), **arguments)
    assert len({tuple(out.tokens.flatten().tolist()) for out in (heavy_only, light_only, mixed)}) == 3


def test_models_in_a_plan_are_put_back(model, make_model):
    light = make_model().train()
    model.eval()
    sample(model, 1, length=4, plan=ComputePlan.parse("L2,H2", light=light, heavy=model))
    assert light.training
    assert not model.training


def test_adaptive_and_constant():
    plan = ComputePlan.adaptive(eps=0.1, max_loops=12)
    assert plan.at(3, 7) == StepCompute(None, 12, 0.1)
    assert plan.num_steps is None
    assert str(plan) == "adaptive(eps=0.1, max_loops=12)"
    assert str(ComputePlan.constant(12)) == "S12"
    assert loops_per_step(ComputePlan.constant(12), 3) == [12] * 3
    assert as_plan(12) == ComputePlan.constant(12)
    assert as_plan(None).at(0, 1) == StepCompute()


def test_saved_flops(model, make_model):
    heavy, light = make_model(num_layers=12), make_model(num_layers=4, loop_start=1, loop_end=2)
    heavy_plain = ComputePlan.parse("L125,H750,L125", light=light, heavy=heavy)
    one_loop = {"light": 1, "heavy": 1}
    assert ComputePlan.parse("L1,H3", **one_loop).saved_flops(model.config, 16) == 0.0
    # layers executed by max_loops = 3: 4 + 2 and 12 + 2 * 2
    assert heavy_plain.saved_flops(heavy.config, 16) == pytest.approx(0.25 * (1 - 6 / 16))
    unlooped = [make_model(num_layers=n, max_loops=1) for n in (4, 12)]
    plan = ComputePlan.parse("L125,H750,L125", light=unlooped[0], heavy=unlooped[1])
    assert plan.saved_flops(unlooped[1].config, 16) == pytest.approx(1 / 6)
    assert plan.saved_flops(unlooped[1].config, 16, "blocks+head") < 1 / 6
    with pytest.raises(ValueError, match="adaptive"):
        ComputePlan.adaptive(0.1, 3).saved_flops(model.config, 16)


@pytest.mark.parametrize(
    "plan",
    [
        ComputePlan.constant(3),
        ComputePlan.adaptive(0.1, 12),
        ComputePlan.adaptive(float("inf"), 12),
        ComputePlan.table([1, 2, 2]),
        ComputePlan.parse("L1,H2", light=1, heavy=2),
        as_plan(None),
    ],
    ids=str,
)
def test_json_round_trip(plan):
    assert ComputePlan.from_json(plan.to_json()) == plan


def test_json_stores_models_by_name(model, make_model):
    light = make_model()
    plan = ComputePlan.parse("L1,H2", light=light, heavy=model)
    assert plan.models == {"L": light, "H": model}
    assert ComputePlan.from_json(plan.to_json(), {"L": light, "H": model}) == plan
    assert ComputePlan.from_json(plan.to_json(), {"L": model, "H": light}) != plan
    with pytest.raises(ValueError, match="needs the model 'H'"):
        ComputePlan.from_json(plan.to_json(), {"L": light})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"segments": []}', '{"segments": [1]}', '{"segments": [{"name": "S1"}]}', "null"],
)
def test_bad_json(text):
    with pytest.raises(ValueError, match="plan"):
        ComputePlan.from_json(text)


@pytest.mark.parametrize("text", ["", "L", "X5", "L5;H5", "L5,,H5", "L-5", "S2", "S:5", "l5", "(L5", "L5)"])
def test_unreadable_text(text):
    with pytest.raises(ValueError, match="cannot read"):
        ComputePlan.parse(text, light=1, heavy=2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ComputePlan.parse("L0,H5", light=1, heavy=2), ValueError, "steps of 'L0'"),
        (lambda: ComputePlan.parse("S0:5"), ValueError, "loops of 'S0:5'"),
        (lambda: ComputePlan.parse("L1,H5", light=1), ValueError, "heavy is not given"),
        (lambda: ComputePlan.parse("L1", light=0), ValueError, "light"),
        (lambda: ComputePlan.parse("L1", light=1.5), TypeError, "light"),
        (lambda: ComputePlan.parse("L1", light="big"), TypeError, "light"),
        (lambda: ComputePlan.parse(5), TypeError, "text"),
        (lambda: ComputePlan.constant(0), ValueError, "num_loops"),
        (lambda: ComputePlan.constant(2.0), TypeError, "num_loops"),
        (lambda: ComputePlan.constant(True), TypeError, "num_loops"),
        (lambda: ComputePlan.table([]), ValueError, "empty"),
        (lambda: ComputePlan.table([1, 0]), ValueError, r"loops\[1\]"),
        (lambda: ComputePlan.adaptive(-0.1, 3), ValueError, "eps"),
        (lambda: ComputePlan.adaptive(float("nan"), 3), ValueError, "eps"),
        (lambda: ComputePlan.adaptive("a", 3), ValueError, "eps"),
        (lambda: ComputePlan.adaptive(0.1, 0), ValueError, "max_loops"),
        (lambda: ComputePlan.table([1, 2]).at(0, 3), ValueError, "2 steps.*3 steps"),
        (lambda: ComputePlan.table([1, 2]).at(2, 2), ValueError, "0..1"),
        (lambda: ComputePlan.table([1, 2]).at(-1, 2), ValueError, "0..1"),
    ],
)
def test_bad_plans_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
