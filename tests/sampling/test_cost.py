"""What a run executes: skipped calls, projected rows, loops, and that skipping changes no token."""

from __future__ import annotations

import math

import pytest
import torch

from loopmdm import ComputePlan, sample


def expected_calls(steps: int, masked: int) -> float:
    return steps * (1 - (1 - 1 / steps) ** masked)


@pytest.mark.parametrize(("steps", "length"), [(64, 40), (16, 16), (100, 10)])
def test_network_calls_match_the_formula_e9(make_fixed, steps, length):
    out = sample(make_fixed(torch.zeros(length, 3)), 400, steps=steps, seed=4)
    calls = out.network_calls.double()
    error = calls.std() / math.sqrt(calls.numel())
    assert abs(calls.mean() - expected_calls(steps, length)) < 3 * error
    assert out.rows_projected == 400 * length
    assert out.total_network_calls == int(calls.sum()) == out.ledger.sequence_calls


def test_prompt_positions_need_no_calls(make_fixed):
    prompt = torch.zeros(30, dtype=torch.int64)
    out = sample(make_fixed(torch.zeros(40, 3)), 400, steps=64, prompt=prompt, seed=4)
    calls = out.network_calls.double()
    assert abs(calls.mean() - expected_calls(64, 10)) < 3 * calls.std() / 20
    assert out.rows_projected == 4000


@pytest.mark.parametrize("order", ["ancestral", "confidence", "left_to_right"])
@pytest.mark.parametrize("time_conditioning", [False, True])
def test_skipping_changes_no_token_e9(make_model, order, time_conditioning):
    model = make_model(time_conditioning=time_conditioning)
    arguments = {"num_samples": 5, "length": 12, "steps": 30, "order": order, "seed": 9}
    skipped = sample(model, **arguments)
    full = sample(model, **arguments, skip_unchanged=False)
    assert torch.equal(skipped.tokens, full.tokens)
    assert (full.network_calls == 30).all()
    assert (skipped.network_calls <= 12).all()
    assert skipped.rows_projected == full.rows_projected


def test_rows_of_each_order(make_fixed):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert sample(make_fixed(logits), 3, order="left_to_right").rows_projected == 3 * 6
    assert sample(make_fixed(logits), 3, order="confidence").rows_projected == 3 * (6 + 5 + 4 + 3 + 2 + 1)


def test_finished_sequences_leave(make_fixed):
    mask = 4
    infill = torch.tensor([[mask, mask, mask, mask], [0, 1, mask, 2], [0, 1, 2, 3]])
    model = make_fixed(torch.zeros(4, 4))
    for order in ("confidence", "left_to_right"):
        out = sample(model, infill=infill, order=order, plan=2)
        assert out.network_calls.tolist() == [4, 1, 0]
        assert out.loops.tolist() == [8, 2, 0]
        assert out.num_steps == 4


def test_loops_follow_the_plan(make_fixed):
    model = make_fixed(torch.zeros(6, 4))
    out = sample(model, 2, order="left_to_right", plan=ComputePlan.table([1, 1, 4, 4, 2, 7]))
    assert [call["num_loops"] for call in model.calls] == [1, 1, 4, 4, 2, 7]
    assert out.loops.tolist() == [19, 19]

    sample(model, 1, order="left_to_right")
    assert model.calls[-1]["num_loops"] == model.config.max_loops


def test_ledger_counts_what_ran(model):
    out = sample(model, 4, length=10, steps=20, plan=3, seed=1)
    assert out.ledger.loops == int(out.loops.sum()) == 3 * out.total_network_calls
    assert out.ledger.rows_projected == out.rows_projected == 40


def test_max_batch_limits_the_forward(make_fixed):
    model = make_fixed(torch.zeros(6, 4))
    sample(model, 7, order="left_to_right", max_batch=3)
    assert sorted({call["tokens"].shape[0] for call in model.calls}) == [1, 3]
