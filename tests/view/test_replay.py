"""Canvases rebuilt from events are those of the run."""

from __future__ import annotations

import pytest
import torch

from loopmdm import LoopMDM, sample
from loopmdm.sampling import StepEvent
from loopmdm.view import Replay

from .conftest import event


@pytest.mark.parametrize("options", [{}, {"order": "confidence", "steps": 5}, {"remask": "cap", "steps": 12}])
def test_the_last_canvas_is_the_result(model: LoopMDM, options: dict[str, object]) -> None:
    canvas = torch.full((3, 16), 257)
    canvas[:, 2], canvas[1, 7] = 65, 66
    replay = Replay(canvas, 257)
    given = canvas != 257

    def check(change: StepEvent) -> None:
        before = replay.tokens.clone()
        replay.apply(change)
        where = (change.sequence, change.positions)
        assert torch.equal(replay.tokens[where], change.tokens)
        assert torch.equal(replay.fresh.nonzero(), torch.stack(where, dim=1))
        assert torch.equal(replay.tokens[~replay.fresh], before[~replay.fresh])
        assert torch.equal(replay.tokens[given], canvas[given])

    result = sample(model, infill=canvas, seed=4, on_step=check, history=True, **options)  # type: ignore[arg-type]
    assert torch.equal(replay.tokens, result.tokens) and not replay.masked.any()
    assert torch.equal(replay.revealed_at >= 0, ~given)
    replay.finish(result)
    assert torch.equal(replay.tokens, result.tokens)
    assert torch.equal(replay.network_calls, result.network_calls) and torch.equal(replay.loops, result.loops)


def test_masking_again_takes_a_position_back() -> None:
    replay = Replay(torch.tensor([[9, 9, 1], [9, 9, 9]]), mask_token_id=9)
    replay.apply(event(0, (0, 0, 4, 0.5, 3), (1, 2, 5, 0.25, 3)))
    assert replay.tokens.tolist() == [[4, 9, 1], [9, 9, 5]]
    assert replay.confidence.tolist() == [[0.5, 0, 0], [0, 0, 0.25]]
    replay.apply(event(3, (0, 0, 9, 0.0, 2), (1, 0, 6, 0.75, 4)))
    assert replay.tokens.tolist() == [[9, 9, 1], [6, 9, 5]]
    assert replay.confidence.tolist() == [[0, 0, 0], [0.75, 0, 0.25]]
    assert replay.revealed_at.tolist() == [[-1, -1, -1], [3, -1, 0]]
    assert replay.fresh.tolist() == [[True, False, False], [True, False, False]]
    assert (replay.step, replay.last_loops) == (3, (2, 4))
    assert replay.loops.tolist() == [5, 7] and replay.network_calls.tolist() == [2, 2]
    replay.apply(event(4, (1, 0, 9, 0.0, 0)))  # masked again without a call
    assert replay.network_calls.tolist() == [2, 2] and replay.last_loops == (2, 4)


def test_a_sequence_is_cut_at_its_end(model: LoopMDM) -> None:
    events: list[StepEvent] = []
    options = {"num_samples": 6, "length": 20, "order": "left_to_right", "progress": False}
    free = sample(model, **options)  # type: ignore[arg-type]
    end = int(free.tokens[0, 8])
    result = sample(model, **options, eos_token_id=end, on_step=events.append)  # type: ignore[arg-type]
    replay = Replay(torch.full((6, 20), 257), 257)
    for change in events:
        replay.apply(change)
    replay.finish(result)
    for row, length, expected in zip(replay.tokens, result.lengths, result.tokens, strict=True):
        assert torch.equal(row[:length], expected[:length]) and bool((row[length:] == -1).all())
    assert int(result.lengths[0]) <= 9 and not replay.masked.any()


def test_the_canvas_is_checked_and_copied() -> None:
    with pytest.raises(ValueError, match=r"canvas must be \[B, L\] and not empty, got shape \(3,\)"):
        Replay(torch.tensor([1, 2, 3]), 9)
    canvas = torch.tensor([[9]])
    Replay(canvas, 9).apply(event(0, (0, 0, 1, 1.0, 1)))
    assert canvas.item() == 9
