"""Puzzle files: one board of 81 (36, 16) characters a line, or the CSV form `puzzle,solution`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

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

BLANKS = ".0_*"
_PUZZLE_COLUMNS = ("puzzle", "puzzles", "quiz", "quizzes", "clues", "sudoku")
_SOLUTION_COLUMNS = ("solution", "solutions", "answer")


class PuzzleFile(NamedTuple):
    """clues and solutions uint8 [N, cells] (None if the file has none), line numbers int64 [N]."""

    spec: SudokuSpec
    clues: Cells
    solutions: Cells | None
    lines: NDArray[np.int64]


def read_puzzles(path: str | os.PathLike[str], spec: SudokuSpec | None = None) -> PuzzleFile:
    """Reads a puzzle file; see `parse_puzzles`."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return parse_puzzles(file, str(path), spec)


def parse_puzzles(text_lines: Iterable[str], path: str, spec: SudokuSpec | None = None) -> PuzzleFile:
    """Puzzles of the lines of a file; blank lines and lines that start with "#" are skipped.

    A line is a board, row-major, with digits and any of `. 0 _ *` for a blank; or comma-separated fields, of
    which a header may name the columns (puzzle or quizzes, solution or solutions), else puzzle then solution.
    path: what messages call the file. spec: the size expected; None takes it from the first board. Raises
    ValueError with the line number on a wrong length, a character outside the alphabet, clues that contradict
    each other, and solutions that are not complete or do not fit.
    """
    puzzles: list[str] = []
    solutions: list[str] = []
    numbers: list[int] = []
    columns: tuple[int, int | None] | None = None
    for number, line in enumerate(text_lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        fields = [field.strip().strip('"') for field in text.split(",")]
        if columns is None:
            columns = _header(fields)
            if columns is not None:
                continue
            columns = (0, 1 if len(fields) > 1 else None)
        needed = 1 + max(columns[0], columns[1] or 0)
        if len(fields) < needed:
            raise ValueError(f"{path}, line {number}: {len(fields)} fields, expected at least {needed}")
        puzzles.append(fields[columns[0]])
        numbers.append(number)
        if columns[1] is not None:
            solutions.append(fields[columns[1]])
    if not puzzles:
        raise ValueError(f"{path}: no puzzles in this file")
    if spec is None:
        spec = _spec_of_length(path, numbers[0], puzzles[0])
    lines = np.array(numbers, dtype=np.int64)
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
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="ascii", newline="\n") as file:
            file.writelines(f"{row}\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def encode_boards(spec: SudokuSpec, cells: ArrayLike, name: str = "cells") -> list[str]:
    """Boards [N, cells] as strings of `cells` characters, "." for a blank."""
    array = check_cells(spec, cells, name)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [N, {spec.cells}], got {list(array.shape)}")
    text = np.where(array == 0, ord("."), array + ord("0")).astype(np.uint8).tobytes().decode("ascii")
    return [text[start : start + spec.cells] for start in range(0, len(text), spec.cells)]


def _header(fields: list[str]) -> tuple[int, int | None] | None:
    names = [field.lower() for field in fields]
    puzzle = [i for i, name in enumerate(names) if name in _PUZZLE_COLUMNS]
    solution = [i for i, name in enumerate(names) if name in _SOLUTION_COLUMNS]
    return (puzzle[0], solution[0] if solution else None) if puzzle else None


def _spec_of_length(path: str | os.PathLike[str], line: int, text: str) -> SudokuSpec:
    for board in (NINE, SIX, FOUR):
        if len(text) == board.cells:
            return board
    raise ValueError(
        f"{path}, line {line}: {len(text)} characters; a board has 81 (9x9), 36 (6x6) or 16 (4x4)"
    )


def _parse(
    path: str | os.PathLike[str], spec: SudokuSpec, lines: NDArray[np.int64], boards: list[str], what: str
) -> Cells:
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
            f"{what}; accepted are 1..{spec.size} and {' '.join(BLANKS)} for a blank"
        )
    return cells


def _describe_clash(spec: SudokuSpec, cells: Cells) -> str:
    digits = cells[units(spec)]
    counts = (digits[:, :, None] == np.arange(1, spec.size + 1)).sum(axis=1)
    unit, digit = np.argwhere(counts > 1)[0]
    kind = ("row", "column", "box")[unit // spec.size]
    return f"the clues contradict each other: {digit + 1} twice in {kind} {unit % spec.size + 1}"
