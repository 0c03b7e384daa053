"""What a run makes of its plan: which model sees which canvas, in how many calls, at what cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loopmdm.model.stages
import loopmdm_kernels as lk
from loopmdm import ComputePlan, sample
from loopmdm.exits import ArgmaxStable, HiddenChange
from loopmdm.model.flops import head_flops, layer_flops
from loopmdm.plan import StepCompute
from loopmdm.sampling.canvas import make_canvas
from loopmdm.view.replay import Replay
from loopmdm_kernels.types import RowRng


def half_filled(mask: int) -> torch.Tensor:
    """Four canvases [4, 16] with 16, 12, 8 and 4 masks."""
    infill = torch.randint(0, mask, (4, 16), generator=torch.Generator().manual_seed(2))
    for row in range(4):
        infill[row, : 16 - 4 * row] = mask
    return infill


@pytest.mark.parametrize("order", ["ancestral", "confidence"])
def test_every_step_asks_the_scheduled_model_e14(model, make_model, order):
    """Each token is the draw from what the scheduled model says of the canvas at its step: none is stale."""
    light = make_model(num_layers=3, hidden_size=8)
    plan = ComputePlan.parse("L3,H5,L4", light=light, heavy=model)
    out = sample(model, 4, length=12, steps=12, order=order, seed=6, plan=plan, history=True)
    mask = model.config.mask_token_id
    replay = Replay(make_canvas(model.config, 4, 12, None, None).tokens, mask)
    seen = set()
    for event in out.history:
        scheduled = light if event.step < 3 or event.step >= 8 else model
        seen.add((id(scheduled), event.step in (3, 8)))
        with torch.no_grad(), torch.inference_mode():
            was_training = scheduled.training
            hidden = scheduled.eval().hidden(replay.tokens)
            drawn = lk.sample_rows(
                hidden,
                scheduled.head(),
                event.sequence * 12 + event.positions,
                RowRng(6, event.sequence, torch.full_like(event.sequence, event.step), event.positions),
                compute_dtype=torch.float32,
            )
            scheduled.train(was_training)
        assert torch.equal(drawn.token, event.tokens)
        replay.apply(event)
    assert torch.equal(replay.tokens, out.tokens)
    assert {(id(light), False), (id(model), False)} <= seen


def test_one_call_for_sequences_of_different_loops(make_fixed):
    model = make_fixed(torch.zeros(16, 3))
    plan = ComputePlan.table([4, 3, 2, 1])
    out = sample(model, infill=half_filled(3), order="first_hitting", plan=plan, seed=1)
    assert len(model.calls) == 16  # as many as the longest has positions
    each = [call["num_loops"] for call in model.calls]
    assert sum(isinstance(loops, torch.Tensor) for loops in each) > 2
    for call, loops in zip(model.calls, each, strict=True):
        if isinstance(loops, torch.Tensor):
            assert loops.shape == call["tokens"].shape[:1] and len(set(loops.tolist())) > 1
    spent = sum(int(torch.as_tensor(c["num_loops"]).expand(len(c["tokens"])).sum()) for c in model.calls)
    assert spent == int(out.loops.sum()) == out.ledger.loops


def test_a_table_by_masks_reads_each_sequences_own_share(make_fixed):
    model = make_fixed(torch.zeros(16, 3))
    plan = ComputePlan.by_mask_ratio(lambda share: 1 + int(8 * share), bins=8)
    out = sample(model, infill=half_filled(3), order="left_to_right", plan=plan, history=True)
    slots = torch.tensor([16, 12, 8, 4])
    left = slots.clone()
    for event in out.history:
        share = left[event.sequence] / slots[event.sequence]
        assert event.loops.tolist() == [plan.at_time(float(r)).num_loops for r in share]
        left[event.sequence] -= 1
    assert len({tuple(event.loops.tolist()) for event in out.history}) > 4


def test_a_call_for_each_model(make_fixed):
    models = [make_fixed(torch.zeros(16, 3)) for _ in range(2)]
    plan = ComputePlan.parse("L1,H1", light=models[0], heavy=models[1])
    out = sample(models[1], infill=half_filled(3), order="first_hitting", plan=plan, seed=3)
    steps = out.num_steps
    assert all(len(model.calls) <= steps for model in models)
    assert sum(len(model.calls) for model in models) > steps
    assert sum(len(c["tokens"]) for model in models for c in model.calls) == out.total_network_calls


@pytest.mark.parametrize(
    "compute",
    [
        StepCompute(None, 5, HiddenChange(0.3)),
        StepCompute(None, 5, HiddenChange(0.3, norm="tokens"), 2),
        StepCompute(None, 5, ArgmaxStable()),
        StepCompute(None, 5, ComputePlan.adaptive(0.01, criterion="output").parts[0].compute.exit, 2),
        StepCompute(None, 4),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_by_one")
def test_the_ledger_counts_what_rules_execute(model, compute, monkeypatch):
    layers, rows = [], []
    blocks = lk.looped_blocks

    def counted(x: torch.Tensor, weights: Any, modulation: Any, num_loops: Any, **options: Any) -> Any:
        out = blocks(x, weights, modulation, num_loops, **options)
        loops = torch.as_tensor(out[1] if isinstance(out, tuple) else num_loops).expand(len(x))
        layers.append(int(loops.sum()) * len(weights) * x.shape[1])
        return out

    monkeypatch.setattr(loopmdm.model.stages.lk, "looped_blocks", counted)
    for op, count in (("head_logits", lambda h, *_: h.shape[0] * h.shape[1]), ("sample_rows", None)):
        real = getattr(lk, op)

        def with_rows(*arguments: Any, real: Any = real, count: Any = count, **options: Any) -> Any:
            rows.append(arguments[2].numel() if count is None else count(*arguments))
            return real(*arguments, **options)

        monkeypatch.setattr(lk, op, with_rows)
    out = sample(
        model, infill=half_filled(11), order="confidence", seed=5, plan=ComputePlan.segments([(16, compute)])
    )
    assert out.ledger.flops("blocks") == pytest.approx(sum(layers) * layer_flops(model.config, 16))
    assert out.rows_projected == sum(rows)
    assert out.ledger.flops("blocks+head") == pytest.approx(
        out.ledger.flops("blocks") + sum(rows) * head_flops(model.config)
    )
    assert 1 < out.ledger.mean_loops < 5


def test_loops_are_recorded_by_step_and_sequence_e13(model):
    plan = ComputePlan.adaptive(0.2, 8)
    out = sample(model, infill=half_filled(11), order="confidence", seed=5, plan=plan, history=True)
    loops = torch.zeros(16, 4, dtype=torch.int64)  # one token a step and sequence
    for event in out.history:
        loops[event.step, event.sequence] = event.loops
    assert torch.equal(loops.sum(dim=0), out.loops)
    assert torch.equal((loops > 0).sum(dim=0), torch.tensor([16, 12, 8, 4]))
    assert len(set(loops[loops > 0].tolist())) > 1


def test_adaptive_segments_cap_each_sequence(model):
    rule = ComputePlan.adaptive(0.0, 5, 2)
    out = sample(model, 3, length=8, order="left_to_right", plan=ComputePlan.segments([(3, 1), (5, rule)]))
    assert out.loops.tolist() == [3 + 25] * 3
    short = ComputePlan.adaptive(float("inf"), None, 2)
    assert sample(model, 3, length=8, order="left_to_right", plan=short).loops.tolist() == [16] * 3


def test_bad_plans_of_runs_are_named(model, make_model):
    other = make_model(vocab_size=13, mask_token_id=12)
    with pytest.raises(ValueError, match="plan's model L has vocab_size 13, but the sampled model has 12"):
        sample(model, 1, length=4, plan=ComputePlan.parse("L2,H2", light=other, heavy=model))
    with pytest.raises(ValueError, match="covers 5 steps, but sampling takes 4"):
        sample(model, 1, length=4, steps=4, plan="S1:2,S2:3")
    with pytest.raises(ValueError, match="min_loops 4, beyond max_loops 3"):
        sample(model, 1, length=4, plan=ComputePlan.adaptive(0.1, min_loops=4))
    with pytest.raises(ValueError, match=r"1\.\.1024"):
        sample(model, 1, length=4, plan=1025)
    with pytest.raises(ValueError, match="cannot read 'X5'"):
        sample(model, 1, length=4, plan="S1:2,X5")
