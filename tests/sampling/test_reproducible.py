"""A sequence is a function of the model, the arguments, the seed and its id: never of its batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import ComputePlan, sample
from loopmdm.sampling import ORDERS

WAYS = [
    *({"order": order, "steps": 16} for order in ORDERS if order != "first_hitting"),
    {"order": "first_hitting"},
    {"order": "first_hitting", "tokens_per_step": 3},
    {"order": "confidence", "threshold": 0.3},
    {"order": "entropy", "entropy_bound": 1.5},
    {"order": "left_to_right", "threshold": 0.2},
    {"order": "random", "tokens_per_step": 2, "window": 5},
    {"order": "margin", "block_length": 5, "tokens_per_step": 2},
    {"order": "ancestral", "block_length": 6, "steps": 16},
    {"order": "ancestral", "remask": "cap", "steps": 16},
    {"order": "ancestral", "remask": "conf", "steps": 16},
    {"order": "confidence", "top_k": 3, "top_p": 0.9, "forbidden": [2, 5]},
    {"order": "random", "eos_token_id": 4},
    {"order": "ancestral", "reference_numerics": True, "steps": 16},
]


def name(options):
    return "-".join(str(value) for value in options.values())


PLANS = [2, ComputePlan.adaptive(0.4, 4), ComputePlan.parse("L4,H8,L4", light=1, heavy=3)]
DATA_PLANS = [
    ComputePlan.by_mask_ratio([1, 4, 2, 3]),
    ComputePlan.adaptive(0.02, 4, 2, "output"),
    ComputePlan.adaptive(max_loops=4, criterion="argmax"),
]


def fits(options, plan):
    """A plan of 16 steps needs 16 steps, or none with a place."""
    timed = options["order"] == "first_hitting" or "threshold" in options or "entropy_bound" in options
    return plan is not PLANS[2] or timed or options.get("steps") == 16


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        *((o, p) for o in WAYS for p in PLANS if fits(o, p)),
        *((o, p) for o in (WAYS[1], WAYS[6], WAYS[8], WAYS[-1]) for p in DATA_PLANS),
    ],
    ids=lambda v: name(v) if isinstance(v, dict) else str(v),
)
def test_batch_invariance(model, options, plan):
    arguments = {"length": 16, "plan": plan, "seed": 21, **options}
    batch = sample(model, 16, **arguments)
    for ids in ([5], [0, 1, 2], [15, 3, 8]):
        alone = sample(model, len(ids), sequence_ids=ids, **arguments)
        assert torch.equal(alone.tokens, batch.tokens[ids])
        assert torch.equal(alone.lengths, batch.lengths[ids])
        assert torch.equal(alone.loops, batch.loops[ids])
        assert torch.equal(alone.network_calls, batch.network_calls[ids])
    assert torch.equal(sample(model, 16, max_batch=3, **arguments).tokens, batch.tokens)


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_skipping_changes_the_cost_alone_e9(model, options):
    arguments = {"num_samples": 3, "length": 16, "seed": 13, "plan": 2, **options}
    skipped = sample(model, **arguments)
    full = sample(model, **arguments, skip_unchanged=False)
    assert torch.equal(skipped.tokens, full.tokens)
    assert torch.equal(skipped.lengths, full.lengths)
    assert (skipped.network_calls <= full.network_calls).all()
    assert (skipped.tokens != model.config.mask_token_id).all()


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_eager_or_compiled(model, options):
    """The compiled network gives the same tokens."""
    arguments = {"num_samples": 2, "length": 8, "seed": 17, "plan": 2, **options}
    eager = sample(model, **arguments)
    model.hidden = torch.compile(model.hidden, backend="aot_eager", dynamic=True)
    assert torch.equal(sample(model, **arguments).tokens, eager.tokens)


@pytest.mark.parametrize("order", ORDERS)
def test_one_token_a_step_does_not_depend_on_the_others_masks(model, order):
    mask = model.config.mask_token_id
    infill = torch.arange(14).remainder(11).repeat(3, 1)
    infill[0, 2:] = mask
    infill[1, 3:6] = mask
    batch = sample(model, infill=infill, order=order, seed=2)
    alone = sample(model, infill=infill[1:2], order=order, seed=2, sequence_ids=[1])
    assert torch.equal(alone.tokens[0], batch.tokens[1])


@pytest.mark.parametrize("order", ORDERS)
def test_seeds(model, order):
    first = sample(model, 4, length=16, order=order, seed=1)
    again = sample(model, 4, length=16, order=order, seed=1)
    other = sample(model, 4, length=16, order=order, seed=2)
    wide = sample(model, 4, length=16, order=order, seed=1 + 2**40)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert not torch.equal(first.tokens, wide.tokens)
    assert len({tuple(row) for row in first.tokens.tolist()}) == 4


@pytest.mark.parametrize("options", WAYS, ids=name)
def test_the_default_backend_draws_the_references_tokens(model, options):
    """Among masks alone all positions predict the same, and rounding would rate them: so some are given."""
    infill = torch.randint(0, 11, (4, 16), generator=torch.Generator().manual_seed(1))
    infill[:, 2:13] = model.config.mask_token_id
    arguments = {"infill": infill, "seed": 6, "plan": 2, **options}
    default = sample(model, **arguments)
    with lk.use_backend("reference"):
        expected = sample(model, **arguments)
    assert torch.equal(default.tokens, expected.tokens)


def test_global_generator_is_not_used(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(model, 2, length=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_needs_no_seed(model):
    runs = [
        sample(model, 3, length=9, order="confidence", temperature=0.0, seed=seed).tokens for seed in (1, 2)
    ]
    assert torch.equal(*runs)
    assert (runs[0] == runs[0][0]).all()


@pytest.mark.parametrize("criterion", ["hidden", "output"])
@pytest.mark.parametrize("order", ORDERS)
def test_adaptive_bounds_e13(model, order, criterion):
    """Threshold 0 is the cap, bit for bit; threshold inf is one loop; loops fall as the threshold grows."""
    arguments = {"num_samples": 4, "length": 12, "order": order, "seed": 3}
    cap = sample(model, plan=4, **arguments)
    never = sample(model, plan=ComputePlan.adaptive(0.0, 4, criterion=criterion), **arguments)
    assert torch.equal(never.tokens, cap.tokens)
    assert torch.equal(never.loops, cap.loops)
    at_once = sample(model, plan=ComputePlan.adaptive(float("inf"), 4, criterion=criterion), **arguments)
    assert torch.equal(at_once.tokens, sample(model, plan=1, **arguments).tokens)
    assert torch.equal(at_once.loops, at_once.network_calls)
    thresholds = {"hidden": (0.05, 0.2, 0.5, 1.0), "output": (1e-6, 1e-3, 0.1, 1.0)}[criterion]
    first_step = [
        sample(model, plan=ComputePlan.adaptive(eps, 8, criterion=criterion), history=True, **arguments)
        .history[0]
        .loops
        for eps in thresholds
    ]
    for tight, loose in pairwise(first_step):
        assert (loose <= tight).all()
    assert (first_step[-1] < first_step[0]).any()


def test_time_conditioning_follows_the_grid(make_model, seen_sigmas):
    model = make_model(time_conditioning=True)
    seen = seen_sigmas(model)
    out = sample(model, 1, length=6, steps=4, history=True, seed=8)
    times = torch.tensor([1 - event.step / 4 for event in out.history])
    assert torch.allclose(torch.cat(seen), -torch.log1p(-0.999 * times))

    seen.clear()
    sample(model, 1, length=4, order="left_to_right", seed=8)
    times = torch.tensor([1.0, 0.75, 0.5, 0.25])
    assert torch.allclose(torch.cat(seen), -torch.log1p(-0.999 * times))
