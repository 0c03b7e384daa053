"""Puzzle files of every layout of `layouts`, read and checked; and written, one board a line."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopmdm.data.raw import read_text
from loopmdm.data.sudoku.boards import (
    FOUR,
    NINE,
    SIX,
    Cells,
    SudokuSpec,
    check_cells,
    has_contradiction,
    is_valid_solution,
    units,
)
from loopmdm.data.sudoku.layouts import BLANKS, Written, accepted, find_boards
from loopmdm_kernels.files import write_file


class PuzzleFile(NamedTuple):
    """clues and solutions uint8 [N, cells] (None if the file has none), line numbers int64 [N]."""

    spec: SudokuSpec
    clues: Cells
    solutions: Cells | None
    lines: NDArray[np.int64]


def read_puzzles(path: str | os.PathLike[str], spec: SudokuSpec | None = None) -> PuzzleFile:
    """Reads a puzzle file: UTF-8, UTF-16 or UTF-32 with a byte order mark, compressed or not.

    See `parse_puzzles` for what it may hold and `loopmdm.data.raw.open_raw` for the compression.
    """
    text = read_text(Path(path), "replace")
    nul = text.find("\0")
    if nul >= 0:
        line = text.count("\n", 0, nul) + 1
        raise ValueError(
            f"{path}, line {line}: a NUL byte; this is no file of text (unpack it, if it is packed)"
        )
    return parse_puzzles(io.StringIO(text, newline=None), str(path), spec)


def parse_puzzles(text_lines: Iterable[str], path: str, spec: SudokuSpec | None = None) -> PuzzleFile:
    """Puzzles of the lines of a file; blank lines and those that start with "#" or ";" are skipped.

    A cell is a digit, or one of `. 0 _ * - x` for a blank. Layouts:

    - a board a line, row-major; spaces and bars may stand between cells, and a comment after "#";
    - columns between tabs, commas, semicolons or spaces. A header may name them: puzzle (quiz, question,
      clues, sudoku, board, grid) and solution (answer, solved). Without such names a column of boards is the
      puzzle, a second one the solution, and others are passed over;
    - a board over as many lines as it has rows (.sdk, .ss, `format_board`), cells side by side or between
      spaces, commas and bars; headings may stand between boards, rules between boxes. Of two boards side by
      side, as `loopmdm solve` prints them, the left one is taken.

    Args:
        text_lines: the lines.
        path: what messages call the file.
        spec: the size expected; None takes it from the first board.

    Raises:
        ValueError: with the line number: a wrong length, a character outside the alphabet, clues that
            contradict each other, columns without a board, boards without all of their rows, and solutions
            that are not complete or do not fit.
    """
    boards = find_boards(text_lines, path)
    if spec is None:
        spec = _spec_of_length(path, boards[0])
    lines = np.array([board.line for board in boards], dtype=np.int64)
    puzzles = [board.puzzle for board in boards]
    solutions = [board.solution for board in boards if board.solution is not None]
    clues = _parse(path, spec, lines, puzzles, "puzzle")
    for index in np.flatnonzero(has_contradiction(spec, clues))[:1]:
        raise ValueError(f"{path}, line {lines[index]}: {_describe_clash(spec, clues[index])}")
    if not solutions:
        return PuzzleFile(spec, clues, None, lines)
    answers = _parse(path, spec, lines, solutions, "solution")
    for index in np.flatnonzero(~is_valid_solution(spec, answers, clues))[:1]:
        raise ValueError(
            f"{path}, line {lines[index]}: the solution is not a full valid board with these clues"
        )
    return PuzzleFile(spec, clues, answers, lines)


def write_puzzles(
    path: str | os.PathLike[str], spec: SudokuSpec, clues: ArrayLike, solutions: ArrayLike | None = None
) -> None:
    """Writes clues [N, cells] one board a line, or as CSV with header `puzzle,solution`; blanks are ".".

    The file appears whole or not at all.
    """
    rows = encode_boards(spec, clues, "clues")
    if solutions is not None:
        answers = encode_boards(spec, solutions, "solutions")
        if len(answers) != len(rows):
            raise ValueError(f"solutions has {len(answers)} boards, clues has {len(rows)}")
        rows = ["puzzle,solution", *(f"{row},{answer}" for row, answer in zip(rows, answers, strict=True))]
    write_file(path, "".join(f"{row}\n" for row in rows))


def encode_boards(spec: SudokuSpec, cells: ArrayLike, name: str = "cells") -> list[str]:
    """Boards [N, cells] as strings of `cells` characters, "." for a blank."""
    array = check_cells(spec, cells, name)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [N, {spec.cells}], got {list(array.shape)}")
    text = np.where(array == 0, ord("."), array + ord("0")).astype(np.uint8).tobytes().decode("ascii")
    return [text[start : start + spec.cells] for start in range(0, len(text), spec.cells)]


def _spec_of_length(path: str, board: Written) -> SudokuSpec:
    for known in (NINE, SIX, FOUR):
        if len(board.puzzle) == known.cells:
            return known
    raise ValueError(
        f"{path}, line {board.line}: {len(board.puzzle)} characters; a board has 81 (9x9), 36 (6x6) or"
        " 16 (4x4) in one line, or 9, 6 or 4 in each of as many lines"
    )


def _parse(path: str, spec: SudokuSpec, lines: NDArray[np.int64], boards: list[str], what: str) -> Cells:
    for number, text in zip(lines, boards, strict=True):
        if len(text) != spec.cells:
            raise ValueError(
                f"{path}, line {number}: the {what} has {len(text)} characters, {spec} needs {spec.cells}"
            )
    codes = np.frombuffer("".join(boards).encode("latin-1", "replace"), dtype=np.uint8)
    table = np.full(256, 255, dtype=np.uint8)
    table[[ord(blank) for blank in BLANKS]] = 0
    table[ord("1") : ord("1") + spec.size] = np.arange(1, spec.size + 1)
    cells: Cells = table[codes].reshape(len(boards), spec.cells)
    for index, position in np.argwhere(cells == 255)[:1]:
        raise ValueError(
            f"{path}, line {lines[index]}: {boards[index][position]!r} at character {position + 1} of the "
            f"{what}; {accepted(spec.size)}"
        )
    return cells


def _describe_clash(spec: SudokuSpec, cells: Cells) -> str:
    digits = cells[units(spec)]
    counts = (digits[:, :, None] == np.arange(1, spec.size + 1)).sum(axis=1)
    unit, digit = np.argwhere(counts > 1)[0]
    kind = ("row", "column", "box")[unit // spec.size]
    return f"the clues contradict each other: {digit + 1} twice in {kind} {unit % spec.size + 1}"
