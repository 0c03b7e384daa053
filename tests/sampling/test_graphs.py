"""Sampling with CUDA graphs, recorded on the CPU: the same bits, few graphs, and clear refusals."""

from __future__ import annotations

import weakref

import pytest
import torch

from loopmdm import ComputePlan, sample
from loopmdm.sampling import graphs as network_graphs
from loopmdm_kernels.graphs import bucket, captured_by
from loopmdm_kernels.testing import RecordedGraphs

FIELDS = ("tokens", "lengths", "loops", "network_calls")
WAYS = [
    {"order": "ancestral", "steps": 24},
    {"order": "first_hitting"},
    {"order": "confidence", "steps": 10},
    {"order": "entropy", "entropy_bound": 1.5},
    {"order": "left_to_right", "threshold": 0.4},
    {"order": "random", "tokens_per_step": 2, "window": 5},
    {"order": "margin", "block_length": 5, "tokens_per_step": 2},
    {"order": "ancestral", "remask": "cap", "steps": 24},
    {"order": "random", "eos_token_id": 4},
    {"order": "random", "temperature": 0.0, "forbidden": [2, 5]},
    {"order": "confidence", "steps": 8, "top_k": 3, "top_p": 0.9},
    {"order": "ancestral", "steps": 24, "top_p": 0.8, "length": [16, 9, 16, 12, 9, 3, 16]},
    {"order": "ancestral", "steps": 24, "max_batch": 2},
    {"order": "ancestral", "steps": 24, "skip_unchanged": False},
    {"order": "ancestral", "steps": 24, "length": [16, 9, 16, 12, 9, 3, 16], "prompt": [[7]] * 6 + [[1, 2]]},
    {"order": "ancestral", "steps": 24, "dtype": torch.bfloat16},
]
PLANS = [
    ComputePlan.table([1, 1, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1] * 2),
    ComputePlan.parse("S1:6,S3:12,S2:6"),
    ComputePlan.by_mask_ratio([1, 4, 2, 3]),
    ComputePlan.adaptive(0.4, 4),
    ComputePlan.adaptive(0.4, 5, 2),
]


def name(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def both(model, *arguments, at_least=1, **options):
    """Samples without and with graphs, which must be the same bits; the graphs."""
    recorded = RecordedGraphs()
    plain = sample(model, *arguments, history=True, **options)
    with captured_by(recorded):
        graphed = sample(model, *arguments, history=True, cuda_graphs=True, **options)
    for field in FIELDS:
        assert torch.equal(getattr(plain, field), getattr(graphed, field)), field
    assert plain.rows_projected == graphed.rows_projected
    assert plain.ledger.report() == graphed.ledger.report()
    assert len(plain.history) == len(graphed.history)
    for event, other in zip(plain.history, graphed.history, strict=True):
        assert all(map(torch.equal, event[1:], other[1:]))
    assert recorded.replays >= at_least
    return recorded


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_the_same_samples_in_every_order(model, options):
    both(model, 7, **{"length": 16, "seed": 21, "plan": 2, **options})


@pytest.mark.parametrize("options", WAYS[:2], ids=name)
@pytest.mark.parametrize("plan", PLANS, ids=name)
def test_the_same_samples_with_every_plan(model, options, plan):
    both(model, 7, length=16, seed=4, plan=plan, **options)


def test_models_of_a_plan_have_graphs_of_their_own(model, make_model):
    light = make_model(num_layers=3, loop_start=1, loop_end=2, hidden_size=8)
    plan = ComputePlan.parse("L8,H8,L8", light=light, heavy=model)
    for options in ({}, {"top_k": 4}):
        both(model, 5, length=16, steps=24, plan=plan, at_least=8, **options)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_models_conditioned_on_time(make_model, dtype):
    conditioned = make_model(time_conditioning=True)
    options = {"length": 16, "order": "random", "tokens_per_step": 2, "dtype": dtype}
    both(conditioned, 5, plan=ComputePlan.adaptive(0.3, 3), at_least=6, **options)
    both(conditioned, 5, plan=2, at_least=6, top_p=0.9, **options)


def test_batches_and_rows_share_graphs(model):
    """Three graphs serve 24 sequences that are computed, or not, in ever different numbers."""
    sizes = []

    def count(event):
        sizes.append(event.sequence.unique().numel())

    recorded = both(model, 24, length=8, steps=16, plan=2, at_least=10, on_step=count)
    assert len(set(sizes)) >= 6 and recorded.captures <= 3


def test_few_graphs_are_kept(model, monkeypatch):
    monkeypatch.setattr(network_graphs, "MAX_GRAPHS", 2)
    plan = ComputePlan.table([1, 2, 3, 3, 2, 1] * 4)
    both(model, 3, length=20, steps=24, plan=plan)


def test_replays_forgets_what_was_not_used_lately():
    done, graphs = [], {}

    def capture(call):
        call()

        def replay():
            done.append("replayed")

        graphs[done.pop()] = weakref.ref(replay)
        return replay

    replays = network_graphs.Replays(capture, 2)
    for key in "aabba":
        replays.run(key, lambda key=key: done.append(key))
    assert done == ["a", "replayed", "b", "replayed", "replayed"]
    replays.run("c", lambda: done.append("c"))  # b is the oldest
    assert graphs["a"]() is not None and graphs["b"]() is None
    replays.run("b", lambda: done.append("b"))
    assert done[-2:] == ["c", "b"]


def test_a_failed_call_leaves_no_graph_behind():
    replays = network_graphs.Replays(lambda call: call, 2)

    def fail():
        raise ValueError("as asked")

    for _ in range(2):
        with pytest.raises(ValueError, match="as asked"):
            replays.run("a", fail)
    replays.run("a", lambda: None)
    with pytest.raises(ValueError, match="as asked"):
        replays.run("a", fail)


@pytest.mark.parametrize("replaced", [False, True])
def test_changed_weights_are_seen(model, replaced):
    """In place, or by other parameters at other addresses."""
    both(model, 2, length=8, steps=8, plan=2, order="random")
    weight = model.blocks[1].attn_qkv.weight
    with torch.no_grad():
        if replaced:
            model.blocks[1].attn_qkv.weight = torch.nn.Parameter(weight * 1.5)
        else:
            weight.mul_(1.5)
    both(model, 2, length=8, steps=8, plan=2, order="random")


def test_buckets():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25, 97, 129)] == [
        1, 1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32, 128, 192,
    ]  # fmt: skip
    assert all(n <= bucket(n) < 1.5 * n for n in range(1, 3000))


REFUSED = [
    ({"plan": ComputePlan.adaptive(max_loops=3, criterion="argmax")}, "exit rule argmax decides on the host"),
    ({"reference_numerics": True}, "cuda_graphs does not go with reference_numerics"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_captured_is_named(model, options, message):
    with captured_by(RecordedGraphs()), pytest.raises(ValueError, match=message):
        sample(model, 1, length=4, cuda_graphs=True, **options)


def test_models_that_cannot_be_captured_are_named(model, make_fixed):
    with pytest.raises(ValueError, match="cuda_graphs: they need a CUDA device, and the model is on cpu"):
        sample(model, 1, length=4, cuda_graphs=True)
    other = make_fixed(torch.zeros(4, 3))
    with captured_by(RecordedGraphs()), pytest.raises(ValueError, match="takes a LoopMDM, got TableDenoiser"):
        sample(other, 1, length=4, cuda_graphs=True)


def test_a_call_that_is_not_finite_is_named_as_without_graphs(model):
    with torch.no_grad():
        model.blocks[0].attn_qkv.weight[0, 0] = torch.nan
    with captured_by(RecordedGraphs()), pytest.raises(ValueError, match="not finite at step 0"):
        sample(model, 1, length=4, cuda_graphs=True)
