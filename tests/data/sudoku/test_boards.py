"""Grids, their validity, and how they are shown."""

from __future__ import annotations

import numpy as np
import pytest

from loopmdm.data.sudoku import (
    FOUR,
    NINE,
    SIX,
    SudokuSpec,
    format_board,
    generate,
    has_contradiction,
    is_valid_solution,
    spec,
)


def test_spec() -> None:
    assert (spec("9x9"), spec("6x6"), spec("4x4")) == (NINE, SIX, FOUR)
    assert (NINE.size, NINE.cells, NINE.vocab_size, NINE.mask_token_id) == (9, 81, 10, 9)
    assert (SIX.size, SIX.cells, SIX.vocab_size, SIX.mask_token_id) == (6, 36, 7, 6)
    with pytest.raises(ValueError, match="9x9, 6x6, 4x4, got '8x8'"):
        spec("8x8")
    with pytest.raises(ValueError, match="2x2, 2x3 or 3x3, got 5x5"):
        SudokuSpec(5, 5)


def test_units_of_6x6() -> None:
    _, _, box = SIX.units_of_cells()
    assert (
        box.reshape(6, 6).tolist()
        == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2 + [[4, 4, 4, 5, 5, 5]] * 2
    )


@pytest.mark.parametrize("board", [NINE, SIX], ids=str)
def test_validity(board: SudokuSpec) -> None:
    made = generate(board, 50, seed=0, clues=None)
    assert is_valid_solution(board, made.solutions).all()
    assert is_valid_solution(board, made.solutions, made.clues).all()
    assert not is_valid_solution(board, made.clues).any()
    assert is_valid_solution(board, made.solutions[0], made.clues[0]).shape == ()
    for cell in range(board.cells):
        for wrong in (0, made.solutions[0, cell] % board.size + 1, board.size + 1, 255):
            grid = made.solutions[0].copy()
            grid[cell] = wrong
            assert not is_valid_solution(board, grid)


def test_latin_squares_with_wrong_boxes_are_invalid() -> None:
    rows = np.arange(9)
    assert not is_valid_solution(NINE, ((rows[:, None] + rows) % 9 + 1).ravel())


def test_one_broken_clue_makes_a_valid_grid_wrong() -> None:
    made = generate(NINE, 1, seed=0, clues=(30, 30))
    for cell in np.flatnonzero(made.clues[0]):
        clues = made.clues[0].copy()
        clues[cell] = clues[cell] % 9 + 1
        assert not is_valid_solution(NINE, made.solutions[0], clues)


def test_contradictions() -> None:
    made = generate(SIX, 30, seed=0, clues=None)
    assert not has_contradiction(SIX, made.clues).any()
    board = np.zeros((4, 36), np.uint8)
    board[0, [0, 5]] = 3  # row
    board[1, [0, 30]] = 3  # column
    board[2, [0, 8]] = 3  # box
    board[3, [0, 9]] = 3  # none of them
    assert has_contradiction(SIX, board).tolist() == [True, True, True, False]


def test_format() -> None:
    grid = np.array([5, 2, 4, 1, 6, 3] + [0] * 29 + [6], dtype=np.uint8)
    assert format_board(SIX, grid) == "\n".join(
        [
            "+-------+-------+",
            "| 5 2 4 | 1 6 3 |",
            "| . . . | . . . |",
            "+-------+-------+",
            "| . . . | . . . |",
            "| . . . | . . . |",
            "+-------+-------+",
            "| . . . | . . . |",
            "| . . . | . . 6 |",
            "+-------+-------+",
        ]
    )
    assert {len(line) for line in format_board(NINE, np.zeros(81, int)).split("\n")} == {25}


def test_colours() -> None:
    grid = np.zeros(16, dtype=np.uint8)
    clues = grid.copy()
    grid[:4] = [1, 2, 3, 3]
    clues[0] = 1
    bold, green, red = "\033[1m1\033[0m", "\033[32m2\033[0m", "\033[31m3\033[0m"
    first = format_board(FOUR, grid, clues=clues, color=True).split("\n")[1]
    assert first == f"| {bold} {green} | {red} {red} |"
    clues[1] = 4  # a broken clue is red too
    assert "\033[31m2\033[0m" in format_board(FOUR, grid, clues=clues, color=True)
    assert "\033" not in format_board(FOUR, grid, clues=clues)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"grid must have shape \[\.\.\., 81\] for 9x9, got \[3, 80\]"):
        is_valid_solution(NINE, np.zeros((3, 80), int))
    with pytest.raises(ValueError, match="cells must be one board"):
        format_board(SIX, np.zeros((2, 36), int))
