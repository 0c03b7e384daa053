"""Golden traces: how much a step reveals, and where."""

from __future__ import annotations

import math

import pytest
import torch

from loopmdm import ComputePlan, sample

from .conftest import reveal_steps

MASK = 3
# Probabilities by position. Confidence ranks 3 > 0 > 5 > 1 > 4 > 2, margin 3 > 0 > 5 > 4 > 1 > 2 and entropy,
# the least first, 3 > 0 > 1 > 5 > 4 > 2.
PROBS = torch.tensor(
    [
        [0.90, 0.05, 0.05],
        [0.51, 0.485, 0.005],
        [0.36, 0.32, 0.32],
        [0.01, 0.01, 0.98],
        [0.20, 0.30, 0.50],
        [0.20, 0.60, 0.20],
    ]
)
LOGITS = PROBS.log()
GREEDY = [0, 0, 0, 2, 2, 1]


def trace(make_fixed, logits=LOGITS, **options) -> list[list[int]]:
    out = sample(make_fixed(logits), 1, temperature=0.0, history=True, **options)
    assert out.tokens.tolist() == [logits.argmax(dim=1).tolist()]
    assert out.num_steps == len(out.history) or "steps" in options
    return [event.positions.tolist() for event in out.history]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("confidence", [[3], [0], [5], [1], [4], [2]]),
        ("margin", [[3], [0], [5], [4], [2], [1]]),
        ("entropy", [[3], [0], [1], [5], [4], [2]]),
        ("left_to_right", [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_top_1_e17(make_fixed, order, expected):
    assert trace(make_fixed, order=order) == expected
    assert trace(make_fixed, order=order, tokens_per_step=1) == expected
    assert trace(make_fixed, order=order, steps=6) == expected


@pytest.mark.parametrize(
    ("order", "k", "expected"),
    [
        ("confidence", 2, [[0, 3], [1, 5], [2, 4]]),
        ("confidence", 4, [[0, 1, 3, 5], [2, 4]]),
        ("margin", 2, [[0, 3], [4, 5], [1, 2]]),
        ("entropy", 2, [[0, 3], [1, 5], [2, 4]]),
        ("left_to_right", 4, [[0, 1, 2, 3], [4, 5]]),
        ("confidence", 100, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_top_k_reveals_k_or_what_is_left_e17(make_fixed, order, k, expected):
    assert trace(make_fixed, order=order, tokens_per_step=k) == expected


@pytest.mark.parametrize(
    ("order", "threshold", "expected"),
    [
        ("confidence", 0.55, [[0, 3, 5], [1], [4], [2]]),
        ("confidence", 0.9, [[0, 3], [5], [1], [4], [2]]),
        ("confidence", 1.0, [[3], [0], [5], [1], [4], [2]]),
        ("confidence", 0.0, [[0, 1, 2, 3, 4, 5]]),
        ("margin", 0.15, [[0, 3, 4, 5], [2], [1]]),
        ("entropy", 0.8, [[0, 1, 3], [5], [4], [2]]),
        ("left_to_right", 0.505, [[0, 1], [2], [3], [4], [5]]),
        ("left_to_right", 0.3, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_threshold_reveals_what_reaches_it_and_at_least_one_e17(make_fixed, order, threshold, expected):
    assert trace(make_fixed, order=order, threshold=threshold) == expected


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "left_to_right", "random"])
@pytest.mark.parametrize("bound", [0.0, 0.3, 0.9, 2.0, 100.0])
def test_entropy_bound(make_fixed, order, bound):
    """The longest lead, in the order's sequence, with sum H - max H <= bound."""
    entropy = -(PROBS * LOGITS).sum(dim=1)
    sequence = [p for step in trace(make_fixed, order=order) for p in step]
    left, expected = list(sequence), []
    while left:
        count = 1
        while count < len(left):
            lead = entropy[left[: count + 1]]
            if float(lead.sum() - lead.max()) > bound:
                break
            count += 1
        expected.append(sorted(left[:count]))
        left = left[count:]
    assert trace(make_fixed, order=order, entropy_bound=bound) == expected


def test_blocks_are_filled_one_after_the_other(make_fixed):
    assert trace(make_fixed, order="confidence", block_length=3) == [[0], [1], [2], [3], [5], [4]]
    assert trace(make_fixed, order="confidence", block_length=4, tokens_per_step=3) == [
        [0, 1, 3],
        [2],
        [4, 5],
    ]
    assert trace(make_fixed, order="confidence", block_length=3, steps=4) == [[0], [1, 2], [3], [4, 5]]
    assert trace(make_fixed, order="confidence", block_length=3, threshold=0.55) == [
        [0],
        [1],
        [2],
        [3, 5],
        [4],
    ]
    assert trace(make_fixed, order="left_to_right", block_length=2, steps=3) == [[0, 1], [2, 3], [4, 5]]


def test_blocks_begin_at_the_first_mask(make_fixed):
    infill = torch.tensor([1, MASK, MASK, 1, MASK, MASK])
    out = sample(
        make_fixed(LOGITS),
        infill=infill,
        num_samples=1,
        order="confidence",
        block_length=2,
        history=True,
        temperature=0.0,
    )
    # blocks 1-2 and 3-4 and 5
    assert [event.positions.tolist() for event in out.history] == [[1], [2], [4], [5]]


@pytest.mark.parametrize("order", ["ancestral", "first_hitting", "random"])
def test_drawn_orders_keep_to_the_blocks(make_fixed, order):
    out = sample(make_fixed(torch.zeros(12, 3)), 200, order=order, block_length=4, seed=1, history=True)
    latest = torch.full((200,), -1)
    for event in out.history:
        block = event.positions // 4
        assert (block >= latest[event.sequence]).all()
        latest.scatter_reduce_(0, event.sequence, block, "amax")
    assert (latest == 2).all()


def test_a_window_slides_with_the_first_mask(make_fixed):
    assert trace(make_fixed, order="confidence", window=2) == [[0], [1], [3], [4], [5], [2]]
    assert trace(make_fixed, order="confidence", window=1) == [[0], [1], [2], [3], [4], [5]]
    assert trace(make_fixed, order="confidence", window=6) == trace(make_fixed, order="confidence")
    assert trace(make_fixed, order="confidence", window=3, tokens_per_step=2) == [[0, 1], [3, 4], [2, 5]]
    assert trace(make_fixed, order="confidence", window=2, tokens_per_step=4) == [[0, 1], [2, 3], [4, 5]]
    assert trace(make_fixed, order="confidence", window=4, threshold=0.55) == [[0, 3], [5], [1], [4], [2]]


def test_rows_in_reach_are_all_that_is_projected(make_fixed):
    model = make_fixed(LOGITS)
    assert sample(model, 2, order="confidence", window=2).rows_projected == 2 * (2 * 5 + 1)
    assert sample(model, 2, order="confidence", block_length=3).rows_projected == 2 * (3 + 2 + 1) * 2
    assert sample(model, 2, order="random", window=3).rows_projected == 2 * 6
    assert sample(model, 2, order="random", tokens_per_step=2).rows_projected == 2 * 6


def test_sequences_reveal_at_their_own_pace(make_fixed):
    """A threshold gives each sequence as many steps as it needs."""
    infill = torch.tensor([[MASK] * 6, [MASK, 0, 0, MASK, 0, 0]])
    out = sample(make_fixed(LOGITS), infill=infill, order="confidence", threshold=0.55, temperature=0.0)
    assert out.network_calls.tolist() == [4, 1]
    assert out.num_steps == 4


def test_plans_follow_the_share_of_masks_where_steps_have_no_place(make_fixed):
    """With a threshold the plan of four steps is read at 4 (1 - t), t the share still masked."""
    model = make_fixed(LOGITS)
    plan = ComputePlan.table([1, 2, 3, 4])
    sample(model, 1, order="confidence", threshold=0.55, plan=plan, temperature=0.0)
    # masked 6, 3, 2, 1 of 6: index 0, 2, 2, 3
    assert [call["num_loops"] for call in model.calls] == [1, 3, 3, 4]


def test_plans_follow_each_sequences_own_time(make_model):
    """First hitting: two sequences at different times may run different loops in the same step."""
    model = make_model(max_loops=4)
    plan = ComputePlan.table([1, 4])
    out = sample(model, 6, length=10, order="first_hitting", plan=plan, seed=3, history=True)
    by_step = [event.loops.unique().numel() for event in out.history]
    assert max(by_step) == 2
    assert out.history[0].loops.tolist() == [1] * 6 and out.history[-1].loops.tolist() == [4] * 6
    for sequence in range(6):
        alone = sample(model, 1, length=10, order="first_hitting", plan=plan, seed=3, sequence_ids=[sequence])
        assert torch.equal(alone.tokens[0], out.tokens[sequence])
        assert int(alone.loops) == int(out.loops[sequence])


def test_ancestral_in_blocks_keeps_the_grid_of_each_block(make_fixed):
    """Reveal steps of a block are uniform on its share of the steps."""
    out = sample(make_fixed(torch.zeros(4, 3)), 8000, steps=10, block_length=2, seed=6, history=True)
    reveal = reveal_steps(out)
    for position, start in ((0, 0), (1, 0), (2, 5), (3, 5)):
        counts = torch.bincount(reveal[:, position] - start, minlength=5)
        assert counts.numel() == 5
        assert float(((counts - 1600.0) ** 2 / 1600).sum()) < 20  # chi-square, 4 degrees of freedom


def test_times_in_blocks_are_the_expected_share_of_masks(make_model, seen_sigmas):
    model = make_model(time_conditioning=True)
    seen = seen_sigmas(model)
    sample(model, 1, length=8, steps=8, block_length=4, seed=8, skip_unchanged=False)
    times = -torch.expm1(-torch.cat(seen)) / 0.999
    assert torch.allclose(times, 1 - torch.arange(8) / 8, atol=1e-5)
    assert math.isclose(float(times[0]), 1.0, abs_tol=1e-5)
