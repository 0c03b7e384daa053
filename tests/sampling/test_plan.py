"""Compute plans: grammar, bookkeeping, JSON, and that the sampler runs what the plan says."""

from __future__ import annotations

import json

import pytest
import torch

from loopmdm import ComputePlan, sample
from loopmdm.exits import ArgmaxStable, ExitGate, HiddenChange
from loopmdm.model.flops import head_flops, layer_flops
from loopmdm.plan import MAX_LOOPS, StepCompute, as_plan


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
    assert plan.at(3, 7) == StepCompute(None, 12, HiddenChange(0.1))
    assert plan.num_steps is None
    assert str(plan) == "adaptive(eps=0.1, max_loops=12)"
    assert str(ComputePlan.constant(12)) == "S12"
    assert loops_per_step(ComputePlan.constant(12), 3) == [12] * 3
    assert as_plan(12) == as_plan("12") == ComputePlan.constant(12)
    assert as_plan(None).at(0, 1) == StepCompute()


def test_ledger(model, make_model):
    heavy, light = make_model(num_layers=12), make_model(num_layers=4, loop_start=1, loop_end=2)
    plan = ComputePlan.parse("L125,H750,L125", light=light, heavy=heavy)
    # layers executed by max_loops = 3: 4 + 2 and 12 + 2 * 2
    costs = plan.ledger(heavy.config, 16)
    assert costs["blocks"].saved == pytest.approx(0.25 * (1 - 6 / 16))
    layer = layer_flops(heavy.config, 16)
    assert costs["blocks"].flops == pytest.approx(16 * layer * (250 * 6 + 750 * 16))
    assert costs["blocks+head"].flops == pytest.approx(
        costs["blocks"].flops + 1000 * 16 * head_flops(heavy.config)
    )
    unlooped = [make_model(num_layers=n, max_loops=1) for n in (4, 12)]
    plan = ComputePlan.parse("L125,H750,L125", light=unlooped[0], heavy=unlooped[1])
    costs = plan.ledger(unlooped[1].config, 16)
    assert costs["blocks"].saved == pytest.approx(1 / 6)
    assert 1 / 6 > costs["blocks+head"].saved > costs["blocks+head+embedding"].saved > 0
    assert ComputePlan.constant(4).ledger(model.config, 16, 10)["blocks"].saved == 0.0


def test_ledger_is_what_a_run_executes(model):
    """Without time to skip, the blocks of a run cost what its plan says."""
    plan = ComputePlan.parse("S1:4,S3:8,S2:4")
    out = sample(model, 3, length=16, steps=16, plan=plan, skip_unchanged=False)
    assert out.ledger.flops("blocks") == pytest.approx(3 * plan.ledger(model.config, 16)["blocks"].flops)


@pytest.mark.parametrize("plan", [ComputePlan.adaptive(0.1, 3), ComputePlan.by_mask_ratio([1, 2])], ids=str)
def test_only_a_run_tells_what_these_cost(model, plan):
    with pytest.raises(ValueError, match="known only after a run"):
        plan.ledger(model.config, 16, 8)


@pytest.mark.parametrize(
    "plan",
    [
        ComputePlan.constant(3),
        ComputePlan.adaptive(0.1, 12),
        ComputePlan.adaptive(float("inf"), 12),
        ComputePlan.adaptive(0.5, 12, 3, "output"),
        ComputePlan.adaptive(criterion="argmax"),
        ComputePlan.adaptive(max_loops=4, criterion=HiddenChange(0.2, "old", "masked", "tokens")),
        ComputePlan.adaptive(max_loops=4, criterion=ExitGate((1.0, -0.5, 2.0), 0.3, 0.6)),
        ComputePlan.by_mask_ratio([1, 4, 4, 2]),
        ComputePlan.segments([(3, 2), (5, ComputePlan.adaptive(0.1, 8)), (1, 2)]),
        ComputePlan.table([1, 2, 2]),
        ComputePlan.parse("L1,H2", light=1, heavy=2),
        as_plan(None),
    ],
    ids=str,
)
def test_json_round_trip(plan, tmp_path):
    assert ComputePlan.from_json(plan.to_json()) == plan
    assert "Infinity" not in plan.to_json()
    plan.save(tmp_path / "plan.json")
    assert ComputePlan.load(tmp_path / "plan.json") == as_plan(tmp_path / "plan.json") == plan
    assert as_plan(str(tmp_path / "plan.json")) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (ComputePlan.adaptive(0.1, 12, 2), "adaptive(eps=0.1, max_loops=12, min_loops=2)"),
        (ComputePlan.adaptive(0.1, criterion="output"), "adaptive(output eps=0.1)"),
        (
            ComputePlan.adaptive(None, 5, criterion=ArgmaxStable(2)),
            "adaptive(argmax patience=2, max_loops=5)",
        ),
        (
            ComputePlan.adaptive(max_loops=4, criterion=HiddenChange(0.2, "old")),
            "adaptive(hidden eps=0.2 denominator=old, max_loops=4)",
        ),
        (ComputePlan.by_mask_ratio([1, 4, 4, 2]), "masks(S1:1,S4:2,S2:1)"),
        (
            ComputePlan.segments([(3, 2), (5, ComputePlan.adaptive(0.1, 8)), (1, 2)]),
            "(S2:3,C1:5,S2:1) C1=adaptive(eps=0.1, max_loops=8)",
        ),
        (as_plan(None), "S_max"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plans_print(plan, text):
    assert str(plan) == text


def test_segments(model, make_model):
    light = make_model()
    rule = ComputePlan.adaptive(0.3, 6)
    plan = ComputePlan.segments([(2, 4), (1, light), (2, rule), (1, light), (1, StepCompute(light, 7))])
    assert plan.num_steps == 7
    assert [plan.at(step, 7) for step in range(7)] == [
        *[StepCompute(num_loops=4)] * 2,
        StepCompute(light),
        *[rule.at(0, 1)] * 2,
        StepCompute(light),
        StepCompute(light, 7),
    ]
    assert plan.models == {"C1": light, "C3": light}
    assert ComputePlan.from_json(plan.to_json(), {"C1": light, "C3": light}) == plan
    assert ComputePlan.segments([(125, 2), (750, 12), (125, 2)]) == ComputePlan.parse("S2:125,S12:750,S2:125")


def test_a_table_by_the_share_of_masks():
    plan = ComputePlan.by_mask_ratio(lambda share: 1 if share > 0.5 else 3, bins=4)
    assert plan == ComputePlan.by_mask_ratio([1, 1, 3, 3])
    assert plan.num_steps is None
    assert [plan.at_time(share).num_loops for share in (1.0, 0.8, 0.51, 0.5, 0.3, 0.0)] == [1, 1, 1, 3, 3, 3]
    asked = []
    ComputePlan.by_mask_ratio(lambda share: asked.append(share) or 1, bins=4)
    assert asked == [0.875, 0.625, 0.375, 0.125]
    with pytest.raises(ValueError, match="goes by the share of masks"):
        plan.at(0, 4)


def test_text_and_paths_are_plans(make_fixed, tmp_path):
    plan = ComputePlan.parse("S1:2,S4:3")
    plan.save(tmp_path / "p.json")
    for given in ("S1:2,S4:3", str(tmp_path / "p.json"), tmp_path / "p.json", plan):
        model = make_fixed(torch.zeros(5, 3))
        out = sample(model, 1, order="left_to_right", plan=given)
        assert [call["num_loops"] for call in model.calls] == [1, 1, 4, 4, 4]
        assert out.plan == plan


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
    [
        "",
        "[]",
        "{}",
        '{"segments": []}',
        '{"segments": [1]}',
        '{"segments": [{"name": "S1"}]}',
        "null",
        "[" * 9999,
    ],
)
def test_bad_json(text):
    with pytest.raises(ValueError, match="plan"):
        ComputePlan.from_json(text)


def test_names_in_a_plan_cannot_write_to_the_terminal():
    rule = {"rule": "hidden", "\x1b[31meps": 0.1}
    row = {"name": "S4", "steps": None, "model": None, "num_loops": 4, "exit": rule, "min_loops": 1}
    with pytest.raises(ValueError, match="not an exit rule") as caught:
        ComputePlan.from_json(json.dumps({"reading": "step", "segments": [row]}))
    assert str(caught.value).isprintable()


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        ComputePlan.load(tmp_path / "none.json")
    for text in ("{", '{"reading": "noon", "segments": []}', "\x00"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json: "):
            as_plan(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"'nowhere\.json' is neither a loop count"):
        as_plan("nowhere.json")
    with pytest.raises(ValueError, match=r"plan: '' is neither a loop count"):
        as_plan("")
    stored = ComputePlan.adaptive(0.5, 4).to_json()
    for old, new in (('"hidden"', '"hiden"'), ("0.5", "-1"), ('"eps"', '"epsilon"'), ("4", "4000")):
        (tmp_path / "plan.json").write_text(stored.replace(old, new))
        with pytest.raises(ValueError, match=r"plan\.json: "):
            ComputePlan.load(tmp_path / "plan.json")


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
        (lambda: ComputePlan.adaptive(None, 3), ValueError, "needs a threshold"),
        (lambda: ComputePlan.adaptive(0.1, 3, 4), ValueError, "min_loops is 4, beyond max_loops 3"),
        (lambda: ComputePlan.adaptive(0.1, 3, 0), ValueError, "min_loops"),
        (lambda: ComputePlan.adaptive(0.1, 3, criterion="norm"), ValueError, "criterion must be hidden"),
        (lambda: ComputePlan.adaptive(0.1, 3, criterion="argmax"), ValueError, "eps does not go with"),
        (lambda: ComputePlan.adaptive(-1, 3, criterion="output"), ValueError, "eps"),
        (lambda: ComputePlan.constant(MAX_LOOPS + 1), ValueError, r"1\.\.1024, got 1025"),
        (lambda: ComputePlan.parse("S2000:3"), ValueError, r"1\.\.1024"),
        (lambda: ComputePlan.parse("L3", light=2000), ValueError, r"light must be in 1\.\.1024"),
        (lambda: ComputePlan.table([1, 5000]), ValueError, r"loops\[1\] must be in"),
        (lambda: ComputePlan.adaptive(0.1, 2000), ValueError, r"max_loops must be in 1\.\.1024"),
        (lambda: ComputePlan.by_mask_ratio([]), ValueError, "empty"),
        (lambda: ComputePlan.by_mask_ratio(lambda share: share), TypeError, r"loops\[0\]"),
        (lambda: ComputePlan.by_mask_ratio(lambda share: 1, bins=0), ValueError, "bins"),
        (lambda: ComputePlan.segments([]), ValueError, "empty"),
        (lambda: ComputePlan.segments([(0, 1)]), ValueError, "steps of segment 0"),
        (lambda: ComputePlan.segments([(1, "L")]), TypeError, "compute of segment 0"),
        (lambda: ComputePlan.segments([(1, ComputePlan.table([1]))]), ValueError, "steps of its own"),
        (lambda: ComputePlan.segments([(1, StepCompute(num_loops=0))]), ValueError, "num_loops"),
        (lambda: ComputePlan.constant(2).ledger(None, 8), ValueError, "give steps"),
        (lambda: ComputePlan.table([1, 2]).at_time(1.5), ValueError, "time"),
        (lambda: as_plan(1.5), TypeError, "plan must be"),
        (lambda: ComputePlan.table([1, 2]).at(0, 3), ValueError, "2 steps.*3 steps"),
        (lambda: ComputePlan.table([1, 2]).at(2, 2), ValueError, "0..1"),
        (lambda: ComputePlan.table([1, 2]).at(-1, 2), ValueError, "0..1"),
    ],
)
def test_bad_plans_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
