"""The grid: its sizes, its units, and what makes a board right.

Cells are uint8 arrays [..., cells], row-major: 0 a blank, 1..n a digit. Token ids are digit - 1, and n
the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Cells = NDArray[np.uint8]


@dataclass(frozen=True)
class SudokuSpec:
    """Boxes of `box_rows` x `box_cols` cells; n = box_rows * box_cols rows, columns and boxes."""

    box_rows: int
    box_cols: int

    def __post_init__(self) -> None:
        if (self.box_rows, self.box_cols) not in ((2, 2), (2, 3), (3, 3)):
            raise ValueError(f"boxes must be 2x2, 2x3 or 3x3, got {self.box_rows}x{self.box_cols}")

    @property
    def size(self) -> int:
        return self.box_rows * self.box_cols

    @property
    def cells(self) -> int:
        return self.size**2

    @property
    def vocab_size(self) -> int:
        return self.size + 1

    @property
    def mask_token_id(self) -> int:
        return self.size

    @property
    def min_clues(self) -> int:
        """No puzzle with fewer clues has one solution (McGuire, Tugemann, Civario 2012 for 9x9)."""
        return {4: 4, 6: 8, 9: 17}[self.size]

    def units_of_cells(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The row, the column and the box of every cell, each [cells] in 0..n-1."""
        row, col = np.divmod(np.arange(self.cells, dtype=np.int64), self.size)
        return row, col, row // self.box_rows * self.box_rows + col // self.box_cols

    def __str__(self) -> str:
        return f"{self.size}x{self.size}"


NINE = SudokuSpec(3, 3)
SIX = SudokuSpec(2, 3)
FOUR = SudokuSpec(2, 2)


def spec(name: str) -> SudokuSpec:
    """The board named "9x9", "6x6" or "4x4"."""
    by_name = {str(board): board for board in (NINE, SIX, FOUR)}
    if name not in by_name:
        raise ValueError(f"sudoku size must be one of {', '.join(by_name)}, got {name!r}")
    return by_name[name]


@cache
def units(board: SudokuSpec) -> NDArray[np.int64]:
    """The cells of each unit, [3n, n]: rows, then columns, then boxes."""
    members = [np.flatnonzero(of == unit) for of in board.units_of_cells() for unit in range(board.size)]
    table = np.stack(members)
    table.setflags(write=False)
    return table


def check_cells(board: SudokuSpec, cells: ArrayLike, name: str, *, blanks: bool = True) -> Cells:
    """`cells` as a contiguous uint8 array [..., cells] of digits, or a ValueError that names `name`."""
    array = np.asarray(cells)
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} must be an integer array, got dtype {array.dtype}")
    if array.ndim == 0 or array.shape[-1] != board.cells:
        raise ValueError(f"{name} must have shape [..., {board.cells}] for {board}, got {list(array.shape)}")
    lowest = 0 if blanks else 1
    if array.size and (int(array.min()) < lowest or int(array.max()) > board.size):
        raise ValueError(
            f"{name} must hold {lowest}..{board.size} for {board}, got {array.min()}..{array.max()}"
        )
    return np.ascontiguousarray(array, dtype=np.uint8)


def has_contradiction(board: SudokuSpec, cells: ArrayLike) -> NDArray[np.bool_]:
    """Whether a row, column or box holds a digit twice, [...] for cells [..., cells]. Blanks are free."""
    ordered = np.sort(check_cells(board, cells, "cells")[..., units(board)], axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != 0)
    return np.asarray(repeated.any(axis=(-1, -2)))


def complete_units(spec: SudokuSpec, grid: ArrayLike) -> NDArray[np.bool_]:
    """Which rows, columns and boxes hold every digit, [..., 3n]; grid: [..., cells], any integers."""
    digits = np.asarray(grid)
    if digits.ndim == 0 or digits.shape[-1] != spec.cells:
        raise ValueError(f"grid must have shape [..., {spec.cells}] for {spec}, got {list(digits.shape)}")
    in_units = np.sort(digits[..., units(spec)], axis=-1)
    return np.asarray((in_units == np.arange(1, spec.size + 1)).all(axis=-1))


def is_valid_solution(spec: SudokuSpec, grid: ArrayLike, clues: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Whether a board is full, has every digit once in all units, and keeps every clue.

    grid: [..., cells], any integers: a value outside 1..n only makes its board wrong. clues: the same
    shape, 0 a blank, or None. Returns bool [...].
    """
    valid = complete_units(spec, grid).all(axis=-1)
    if clues is not None:
        given = check_cells(spec, clues, "clues")
        valid &= ((given == 0) | (given == np.asarray(grid))).all(axis=-1)
    return np.asarray(valid)


def format_board(
    spec: SudokuSpec, cells: ArrayLike, *, clues: ArrayLike | None = None, color: bool = False
) -> str:
    """One board [cells] as lines of text with box borders and "." for blanks.

    With `color`, ANSI codes set clues in bold, filled-in digits in green, and those that clash with another
    digit or with their clue in red.
    """
    board = check_cells(spec, cells, "cells")
    if board.ndim != 1:
        raise ValueError(f"cells must be one board [{spec.cells}], got shape {list(board.shape)}")
    given = np.zeros_like(board) if clues is None else check_cells(spec, clues, "clues")
    wrong = _clashes(spec, board) | ((given != 0) & (given != board))
    rule = "+".join(["-" * (2 * spec.box_cols + 1)] * spec.box_rows)
    lines = []
    for row in range(spec.size):
        if row % spec.box_rows == 0:
            lines.append(f"+{rule}+")
        text = "|"
        for col in range(spec.size):
            cell = row * spec.size + col
            glyph = str(board[cell]) if board[cell] else "."
            if color and board[cell]:
                code = "31" if wrong[cell] else "1" if given[cell] else "32"
                glyph = f"\033[{code}m{glyph}\033[0m"
            text += f" {glyph}" + (" |" if (col + 1) % spec.box_cols == 0 else "")
        lines.append(text)
    return "\n".join([*lines, f"+{rule}+"])


def _clashes(board: SudokuSpec, cells: Cells) -> NDArray[np.bool_]:
    clashes = np.zeros(board.cells, dtype=bool)
    for unit in units(board):
        counts = np.bincount(cells[unit], minlength=board.size + 1)
        clashes[unit] |= (counts[cells[unit]] > 1) & (cells[unit] != 0)
    return clashes
