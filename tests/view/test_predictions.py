"""Predictions after each number of loops are those of the model on the canvas of that step."""

from __future__ import annotations

import pytest
import torch

from loopmdm import ComputePlan, LoopMDM, sample
from loopmdm.model import diffusion
from loopmdm.view import Replay
from loopmdm.view.predictions import predict_loops

from .conftest import random_model


@pytest.mark.parametrize("timed", [False, True])
def test_values(timed: bool) -> None:
    model = random_model(time_conditioning=timed)
    canvas = torch.full((2, 10), 257)
    canvas[0, 3], canvas[1, :6] = 65, 66
    plan = ComputePlan.constant(5)  # more loops than in training
    result = sample(model, infill=canvas, order="confidence", plan=plan, history=True, progress=False)
    assert result.history is not None
    found = predict_loops(model, canvas, result.history, plan, result.num_steps, most_states=100)
    assert [one.state for one in found] == list(range(len(result.history)))
    replay = Replay(canvas, 257)
    to_fill = replay.masked.sum(dim=1)
    for one, change in zip(found, result.history, strict=True):
        where = replay.masked.nonzero(as_tuple=True)
        assert one.tokens.shape == one.probabilities.shape == (5, where[0].numel())
        for loops in range(1, 6):
            sigma = diffusion.sigma(replay.masked.sum(dim=1) / to_fill).float()
            with torch.no_grad():
                logits = model(replay.tokens, sigma, num_loops=loops)[where]
            logits[:, 257] = -torch.inf
            probabilities, tokens = logits.double().softmax(-1).max(-1)
            assert torch.equal(one.tokens[loops - 1], tokens)
            torch.testing.assert_close(
                one.probabilities[loops - 1].double(), probabilities, atol=1e-5, rtol=1e-4
            )
        replay.apply(change)


def test_states_are_spread_and_bounded(model: LoopMDM) -> None:
    canvas = torch.full((1, 20), 257)
    result = sample(model, infill=canvas, order="left_to_right", history=True, progress=False)
    assert result.history is not None
    plan = ComputePlan.constant(1)

    def states(most: int) -> list[int]:
        return [
            one.state
            for one in predict_loops(model, canvas, result.history or [], plan, 20, most_states=most)
        ]

    assert states(0) == [] and states(1) == [0] and states(2) == [0, 19]
    assert states(5) == [0, 5, 10, 14, 19] and states(20) == states(99) == list(range(20))
    assert not predict_loops(model, torch.full((1, 25), 257), [], plan, 20, most_states=9)


def test_the_plan_says_which_model_and_how_many_loops(model: LoopMDM) -> None:
    light = random_model(num_layers=2, loop_start=0, loop_end=1, max_loops=1)
    plan = ComputePlan.parse("L6,H6", light, 4)
    canvas = torch.full((1, 12), 257)
    result = sample(model, infill=canvas, order="left_to_right", plan=plan, history=True, progress=False)
    assert result.history is not None
    found = predict_loops(model, canvas, result.history, plan, 12, most_states=12)
    assert [one.tokens.shape[0] for one in found] == [1] * 6 + [4] * 6
    with torch.no_grad():
        logits = light(canvas, num_loops=1)[0]
    assert torch.equal(found[0].tokens[0], logits[:, :257].argmax(-1))
    # A run of as many steps as it takes reads its plan by the share of masks left.
    options = {"order": "confidence", "threshold": 0.0, "history": True, "progress": False}
    fast = sample(model, infill=canvas, plan=plan, **options)  # type: ignore[arg-type]
    assert fast.num_steps == 1 and fast.history is not None
    assert predict_loops(model, canvas, fast.history, plan, 1, most_states=1)[0].tokens.shape == (1, 12)


def test_ragged_sequences(model: LoopMDM) -> None:
    result = sample(model, length=[5, 9], order="left_to_right", history=True, progress=False)
    assert result.history is not None
    canvas = torch.full((2, 9), 257)
    canvas[0, 5:] = -1
    (one,) = predict_loops(model, canvas, result.history, ComputePlan.constant(1), 9, most_states=1)
    with torch.no_grad():
        logits = model(canvas[:1, :5], num_loops=2)[0]
    assert torch.equal(one.tokens[1, :5], logits[:, :257].argmax(-1)) and one.tokens.shape == (3, 14)
