"""Puzzle files: what is read, what is refused and how, and writing whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from loopmdm.data.sudoku import (
    FOUR,
    NINE,
    SIX,
    SudokuSpec,
    encode_boards,
    generate,
    read_puzzles,
    write_puzzles,
)

PUZZLE = "003020600900305001001806400008102900700000008006708200002609500800203009005010300"
SOLUTION = "483921657967345821251876493548132976729564138136798245372689514814253769695417382"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("spec", [NINE, SIX, FOUR], ids=str)
@pytest.mark.parametrize("with_solutions", [False, True])
def test_round_trip(tmp_path: Path, spec: SudokuSpec, with_solutions: bool) -> None:
    made = generate(spec, 30, seed=1, clues=None)
    path = tmp_path / "boards"
    write_puzzles(path, spec, made.clues, made.solutions if with_solutions else None)
    back = read_puzzles(path)
    assert back.spec == spec
    np.testing.assert_array_equal(back.clues, made.clues)
    if with_solutions:
        assert back.solutions is not None
        np.testing.assert_array_equal(back.solutions, made.solutions)
    else:
        assert back.solutions is None
        assert path.read_text().splitlines() == encode_boards(spec, made.clues)


@pytest.mark.parametrize("blank", "0._*")
def test_blanks_comments_and_line_ends(tmp_path: Path, blank: str) -> None:
    board = PUZZLE.replace("0", blank)
    path = write(tmp_path / "p", f"\ufeff# a comment\r\n\r\n  {board} \r\n#\r\n{board}")
    back = read_puzzles(path)
    assert back.lines.tolist() == [3, 5]
    assert back.solutions is None
    assert encode_boards(NINE, back.clues) == [PUZZLE.replace("0", ".")] * 2


@pytest.mark.parametrize(
    "text",
    [
        f"puzzle,solution\n{PUZZLE},{SOLUTION}\n",
        f"quizzes,solutions\n{PUZZLE},{SOLUTION}\n",
        f"id,puzzle,solution,clues,difficulty\n1,{PUZZLE},{SOLUTION},32,0.0\n",
        f'"solution","puzzle"\n"{SOLUTION}","{PUZZLE}"\n',
        f"{PUZZLE},{SOLUTION}",
    ],
)
def test_csv_forms(tmp_path: Path, text: str) -> None:
    back = read_puzzles(write(tmp_path / "p.csv", text))
    assert encode_boards(NINE, back.clues) == [PUZZLE.replace("0", ".")]
    assert back.solutions is not None
    assert encode_boards(NINE, back.solutions) == [SOLUTION]


def test_csv_without_solutions(tmp_path: Path) -> None:
    assert read_puzzles(write(tmp_path / "p", f"puzzle\n{PUZZLE}\n")).solutions is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no puzzles in this file"),
        ("# only a comment\n\n", "no puzzles in this file"),
        ("puzzle,solution\n", "no puzzles in this file"),
        ("12345\n", r"line 1: 5 characters; a board has 81 \(9x9\), 36 \(6x6\) or 16 \(4x4\)"),
        (f"{PUZZLE}\n\n{PUZZLE[:-1]}\n", "line 3: the puzzle has 80 characters, 9x9 needs 81"),
        (
            f"{PUZZLE}\n{PUZZLE[:40]}q{PUZZLE[41:]}\n",
            "line 2: 'q' at character 41 of the puzzle; accepted are 1..9",
        ),
        (f"{PUZZLE[:40]}é{PUZZLE[41:]}\n", "line 1: 'é' at character 41"),
        (f"{PUZZLE[:40]}中{PUZZLE[41:]}\n", "line 1: '中' at character 41"),
        ("7" + "." * 35, r"line 1: '7' at character 1 of the puzzle; accepted are 1\.\.6"),
        (f"{PUZZLE}\n33{PUZZLE[2:]}\n", "line 2: the clues contradict each other: 3 twice in row 1"),
        ("5........" * 2 + "." * 63, "5 twice in column 1"),
        ("5........" + "." * 9 + "..5......" + "." * 54, "5 twice in box 1"),
        (f"puzzle,solution\n{PUZZLE},{SOLUTION}\n{PUZZLE}\n", "line 3: 1 fields, expected at least 2"),
        (f"{PUZZLE},{SOLUTION[:-1]}\n", "line 1: the solution has 80 characters"),
        (f"{PUZZLE},{PUZZLE}\n", "line 1: the solution is not a full valid board with these clues"),
        (f"{PUZZLE},{SOLUTION[::-1]}\n", "line 1: the solution is not a full valid board with these clues"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_puzzles(write(tmp_path / "bad", text))


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ValueError, match="b, line 1: a NUL byte; this is no file of text"):
        read_puzzles(tmp_path / "b")


def test_another_size_than_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: the puzzle has 81 characters, 6x6 needs 36"):
        read_puzzles(write(tmp_path / "p", PUZZLE), SIX)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "p", "old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_puzzles(path, NINE, np.zeros((3, 81), np.uint8))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_bad_boards_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clues must hold 0\.\.9"):
        write_puzzles(tmp_path / "p", NINE, np.full((1, 81), 12))
    with pytest.raises(ValueError, match="solutions has 1 boards, clues has 2"):
        write_puzzles(tmp_path / "p", SIX, np.zeros((2, 36), int), np.zeros((1, 36), int))
    assert not list(tmp_path.iterdir())
