"""Solving puzzles, with a denoiser that knows the answer and with one that does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopmdm import ComputePlan
from loopmdm.data.sudoku import FOUR, SIX, is_valid_solution
from loopmdm.solve import solve_puzzles

SOLUTION = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1], dtype=np.uint8)


def knows(make_fixed, board):
    return make_fixed(
        20.0 * torch.nn.functional.one_hot(torch.from_numpy(board.astype(np.int64)) - 1, 4).float()
    )


def puzzles(count: int) -> np.ndarray:
    blank = np.random.default_rng(0).random((count, 16)) < 0.6
    return np.where(blank, 0, SOLUTION).astype(np.uint8)


@pytest.mark.parametrize("order", ["confidence", "left_to_right", "ancestral"])
def test_known_answers(make_fixed, order):
    given = puzzles(7)
    result = solve_puzzles(knows(make_fixed, SOLUTION), given, FOUR, num_loops=3, order=order, batch_size=3)
    assert (result.boards == SOLUTION).all()
    assert result.boards.dtype == np.uint8
    assert result.solved.all()
    assert result.accuracy == 1.0
    assert (result.loops == 3 * result.network_calls).all()
    if order != "ancestral":
        assert (result.network_calls == (given == 0).sum(axis=1)).all()


def test_verdicts(make_fixed):
    """A puzzle of another board: the model's own digits are valid together, or clash with a clue."""
    swapped = SOLUTION[[*range(4, 8), *range(4), *range(8, 16)]]
    assert is_valid_solution(FOUR, swapped)
    given = np.zeros((3, 16), dtype=np.uint8)
    given[1, 0] = swapped[0]
    given[2] = swapped
    result = solve_puzzles(knows(make_fixed, SOLUTION), given, FOUR)
    assert result.valid.tolist() == [True, False, True]
    assert result.fits_clues.all()
    assert result.solved.tolist() == [True, False, True]
    assert result.network_calls.tolist() == [16, 15, 0]


def test_answers_do_not_depend_on_the_batch(make_model):
    model = make_model(vocab_size=7, mask_token_id=6, max_length=36, positions="learned")
    given = np.zeros((9, 36), dtype=np.uint8)
    given[:, 0] = np.arange(9) % 6 + 1
    arguments = {
        "num_loops": ComputePlan.adaptive(0.5, 3),
        "order": "left_to_right",
        "temperature": 1.0,
        "seed": 5,
    }
    results = [solve_puzzles(model, given, SIX, batch_size=size, **arguments) for size in (1, 4, 9)]
    for result in results[1:]:
        assert (result.boards == results[0].boards).all()
        assert (result.loops == results[0].loops).all()
    assert (results[0].boards[:, 0] == given[:, 0]).all()
    assert len({tuple(board) for board in results[0].boards[:, 1:].tolist()}) == 9


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (np.zeros((1, 15), np.uint8), {}, ValueError, "puzzles"),
        (np.zeros((0, 16), np.uint8), {}, ValueError, "puzzles"),
        (np.zeros(16, np.uint8), {}, ValueError, "puzzles"),
        (np.full((1, 16), 5, np.uint8), {}, ValueError, "puzzles"),
        (np.zeros((1, 16)), {}, TypeError, "puzzles"),
        (np.zeros((1, 16), np.uint8), {"batch_size": 0}, ValueError, "batch_size"),
        (np.zeros((1, 16), np.uint8), {"num_loops": 0}, ValueError, "num_loops"),
        (np.zeros((1, 16), np.uint8), {"order": "best"}, ValueError, "order"),
    ],
)
def test_bad_input_is_named(make_fixed, given, options, error, message):
    with pytest.raises(error, match=message):
        solve_puzzles(knows(make_fixed, SOLUTION), given, FOUR, **options)


def test_model_of_another_board(make_fixed):
    with pytest.raises(ValueError, match="vocab_size 5 and mask_token_id 4, but 6x6 boards need 7 and 6"):
        solve_puzzles(knows(make_fixed, SOLUTION), np.zeros((1, 36), np.uint8), SIX)
