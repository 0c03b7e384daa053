"""Golden traces of the decoding orders on fixed logits."""

from __future__ import annotations

import pytest
import torch

from loopmdm import sample
from loopmdm.sampling.orders import Pace, Slots
from loopmdm.sampling.orders.pace import Spread

# argmax per position 2 0 1 1 0 2; margins, hence confidences, rank 3 > 0 = 4 > 1 > 5 > 2
LOGITS = torch.tensor(
    [
        [0.0, 0.0, 3.0],
        [2.0, 0.0, 0.0],
        [0.0, 0.5, 0.0],
        [0.0, 4.0, 0.0],
        [3.0, 0.0, 0.0],
        [0.0, 0.0, 1.0],
    ]
)
GREEDY = [2, 0, 1, 1, 0, 2]


def trace(out) -> list[list[int]]:
    """Positions revealed by each event of the only sequence."""
    return [event.positions.tolist() for event in out.history]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, [[3], [0], [4], [1], [5], [2]]),
        (6, [[3], [0], [4], [1], [5], [2]]),
        (3, [[0, 3], [1, 4], [2, 5]]),
        (4, [[3], [0, 4], [1], [2, 5]]),
        (1, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_confidence_golden_e17(make_fixed, steps, expected):
    out = sample(make_fixed(LOGITS), 1, order="confidence", steps=steps, temperature=0.0, history=True)
    assert trace(out) == expected
    assert out.tokens.tolist() == [GREEDY]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, [[0], [1], [2], [3], [4], [5]]),
        (3, [[0, 1], [2, 3], [4, 5]]),
        (4, [[0], [1, 2], [3], [4, 5]]),
        (12, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_left_to_right_golden_e17(make_fixed, steps, expected):
    out = sample(make_fixed(LOGITS), 1, order="left_to_right", steps=steps, temperature=0.0, history=True)
    assert trace(out) == expected
    assert out.tokens.tolist() == [GREEDY]


def test_more_steps_than_positions_are_spread(make_fixed):
    out = sample(make_fixed(LOGITS), 1, order="left_to_right", steps=12, temperature=0.0, history=True)
    assert [event.step for event in out.history] == [1, 3, 5, 7, 9, 11]


def test_batch_of_different_masks(make_fixed):
    mask = 3
    infill = torch.tensor([[mask] * 6, [1, mask, mask, mask, 1, mask], [1, 1, mask, 1, 1, 1]])
    out = sample(make_fixed(LOGITS), infill=infill, order="confidence", temperature=0.0, history=True)
    revealed = [[], [], []]
    for event in out.history:
        for sequence, position in zip(event.sequence.tolist(), event.positions.tolist(), strict=True):
            revealed[sequence].append(position)
    assert revealed == [[3, 0, 4, 1, 5, 2], [3, 1, 5, 2], [2]]
    assert out.tokens.tolist() == [GREEDY, [1, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1]]


def test_confidence_reads_the_tokens_already_revealed(make_posterior):
    """Two tokens that must agree: whichever is drawn first decides the other."""
    law = torch.full((2, 2), 1e-6)
    law[0, 0], law[1, 1] = 0.5, 0.5
    out = sample(make_posterior(law), 500, order="confidence", seed=3)
    assert (out.tokens[:, 0] == out.tokens[:, 1]).all()
    assert 180 < int(out.tokens[:, 0].sum()) < 320


@pytest.mark.parametrize("order", ["ancestral", "confidence", "left_to_right"])
@pytest.mark.parametrize("steps", [None, 1, 7, 50])
def test_no_mask_is_left_and_each_position_is_revealed_once(model, order, steps):
    out = sample(model, 3, length=11, order=order, steps=steps, history=True, seed=5)
    assert (out.tokens != model.config.mask_token_id).all()
    revealed = torch.zeros(3, 11, dtype=torch.int64)
    for event in out.history:
        revealed.index_put_(
            (event.sequence, event.positions), torch.ones_like(event.positions), accumulate=True
        )
        assert torch.equal(out.tokens[event.sequence, event.positions], event.tokens)
    assert (revealed == 1).all()


def test_even_spread_agrees_with_its_definition():
    for masked in range(1, 12):
        slots = Slots(torch.full((1, masked), 9), 9, torch.tensor([0]))
        for steps in range(1, 15):
            spread = Spread(slots.blocks, Pace(steps=steps))
            due = [(i + 1) * masked // steps - i * masked // steps for i in range(steps)]
            planned = [step for step, count in enumerate(due) for _ in range(count)]
            assert spread.step_of(slots.blocks.rank(), slots.blocks.of_slot).tolist() == planned


def test_slots_are_named_by_sequence_and_position():
    canvas = torch.tensor([[9, 1, 9], [2, 2, 2], [0, 9, 9]])
    slots = Slots(canvas, 9, torch.tensor([7, 8, 100]))
    assert slots.sequence.tolist() == [0, 0, 2, 2]
    assert slots.position.tolist() == [0, 2, 1, 2]
    assert slots.sequence_id.tolist() == [7, 7, 100, 100]
    assert slots.counts.tolist() == [2, 0, 2]
    assert slots.blocks.rank().tolist() == [0, 1, 0, 1]
