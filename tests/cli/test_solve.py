"""`loopmdm solve`: answers, costs, every way to give puzzles, bad puzzles."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loopmdm import LoopMDM
from loopmdm.data.sudoku import (
    NINE,
    SIX,
    Puzzles,
    encode_boards,
    format_board,
    generate,
    is_valid_solution,
    write_puzzles,
)
from loopmdm.runs import models
from loopmdm.solve import solve_puzzles

from .conftest import Call


@pytest.fixture(scope="module")
def six() -> Puzzles:
    return generate(SIX, 3, seed=1, clues=(20, 30), split="test")


@pytest.fixture
def file(tmp_path: Path, six: Puzzles) -> Path:
    write_puzzles(tmp_path / "six.csv", SIX, six.clues, six.solutions)
    return tmp_path / "six.csv"


def test_answers_are_those_of_the_library(call: Call, file: Path, six: Puzzles, sudoku_run: Path) -> None:
    done = call("solve", file, "--model", sudoku_run, "--loops", "1,2", "--limit", 2, "--json")
    assert done.status == 0, done.err
    document = done.json
    assert (document["puzzles"], document["size"], document["model"]) == (2, "6x6", str(sudoku_run))
    cases = [(r["order"], r["num_loops"]) for r in document["results"]]
    assert cases == [("left_to_right", 1), ("left_to_right", 2), ("confidence", 1), ("confidence", 2)]
    model = LoopMDM.from_pretrained(sudoku_run)
    blanks = (six.clues[:2] == 0).sum(axis=1).tolist()
    for result in document["results"]:
        order, loops = result["order"], result["num_loops"]
        expected = solve_puzzles(model, six.clues[:2], SIX, num_loops=loops, order=order)
        answers = result["answers"]
        assert [a["answer"] for a in answers] == encode_boards(SIX, expected.boards)
        assert [a["puzzle"] for a in answers] == encode_boards(SIX, six.clues[:2])
        assert [a["line"] for a in answers] == [2, 3]
        assert [a["valid"] for a in answers] == is_valid_solution(SIX, expected.boards).tolist()
        assert all(a["fits_clues"] and a["solved"] == a["valid"] for a in answers)
        assert [a["network_calls"] for a in answers] == blanks
        assert [a["loops"] for a in answers] == [loops * calls for calls in blanks]
        assert result["share_solved"] == sum(a["solved"] for a in answers) / 2


def test_a_solved_board_costs_nothing(call: Call, tmp_path: Path, six: Puzzles, sudoku_run: Path) -> None:
    write_puzzles(tmp_path / "full.txt", SIX, six.solutions)
    document = call("solve", tmp_path / "full.txt", "--model", sudoku_run, "--json").json
    for result in document["results"]:
        assert result["share_solved"] == 1.0 and result["stderr"] == 0.0 and result["network_calls"] == 0
        assert [a["answer"] for a in result["answers"]] == encode_boards(SIX, six.solutions)


def test_boards_and_table(call: Call, file: Path, sudoku_run: Path) -> None:
    words = ["--model", sudoku_run, "--loops", 3, "--order", "left_to_right"]
    done = call("solve", file, *words, "--boards", 2)
    assert done.status == 0 and "\033" not in done.out
    assert done.out.startswith("Answers at S = 3, left to right order:\n")
    assert done.out.count("+-------+-------+") == 2 * 2 * 4
    assert "line 2: " in done.out and "line 3: " in done.out and "line 4: " not in done.out
    assert "(2 of 3 boards shown" in done.err
    *_, heading, _, row = done.out.splitlines()
    assert heading.startswith("order") and row.split()[:4] == ["left", "to", "right", "3"]


def test_one_board_and_standard_input(
    call: Call, shipped: Callable[[str], Path], six: Puzzles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "shipped_folder", shipped)
    nine = generate(NINE, 1, seed=2, clues=(60, 70)).clues
    words = ["--loops", 1, "--order", "confidence", "--json"]
    given = call("solve", encode_boards(NINE, nine)[0].replace(".", "0"), *words).json
    assert (given["model"], given["size"], given["puzzles"]) == ("sudoku9", "9x9", 1)
    assert given["results"][0]["stderr"] is None
    assert len(given["results"][0]["answers"][0]["answer"]) == 81
    row = encode_boards(NINE, nine)[0]
    for form in (" ".join(row[i : i + 9] for i in range(0, 81, 9)), format_board(NINE, nine[0])):
        again = call("solve", form, *words).json
        answers = [again["results"][0]["answers"][0], given["results"][0]["answers"][0]]
        assert answers[0] == answers[1] | {"line": answers[0]["line"]}
    blank = "-" + row[1:].replace(".", "-")
    dashes = call("solve", blank, *words).json["results"][0]["answers"][0]
    assert dashes["puzzle"] == "." + row[1:] and dashes["line"] == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("# two\n" + "\n".join(encode_boards(SIX, six.clues[:2]))))
    piped = call("solve", "-", *words).json
    assert (piped["model"], piped["size"], piped["puzzles"]) == ("sudoku6", "6x6", 2)
    assert [a["line"] for a in piped["results"][0]["answers"]] == [2, 3]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_standard_input_with_a_byte_order_mark(
    call: Call, six: Puzzles, sudoku_run: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    boards = encode_boards(SIX, six.clues)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(boards).encode(encoding))))
    piped = call("solve", "-", "--model", sudoku_run, "--loops", 1, "--json").json
    assert [a["puzzle"] for a in piped["results"][0]["answers"]] == boards


def test_puzzles_without_one_solution_are_named_and_not_counted(
    call: Call, tmp_path: Path, six: Puzzles, sudoku_run: Path
) -> None:
    full = six.solutions[0].copy()
    wrong = np.zeros_like(full)
    wrong[:5], wrong[23] = range(1, 6), 6  # the last cell of row 1 must be 6, and its column has one
    free = np.zeros_like(full)
    several = full.copy()
    several[np.isin(full, (1, 2))] = 0  # 1 and 2 may change places everywhere
    write_puzzles(tmp_path / "p.txt", SIX, np.stack([full, wrong, free, several]))
    words = ["solve", tmp_path / "p.txt", "--model", sudoku_run, "--loops", 1, "--order", "confidence"]
    document = call(*words, "--json").json
    assert (document["puzzles"], document["no_solution"], document["several_solutions"]) == (4, 1, 2)
    (result,) = document["results"]
    assert [a["solutions"] for a in result["answers"]] == [1, 0, 2, 2]
    assert (result["puzzles"], result["share_solved"]) == (1, 1.0)
    text = call(*words, "--boards", 4).out
    assert "line 1: solved" in text and "line 2: this puzzle has no solution\n" in text
    assert "line 3: this puzzle has several solutions, and this is " in text and "wrong" not in text
    assert "1 puzzle has no solution, not counted below: line 2\n" in text
    assert "2 puzzles have several solutions, not counted below: lines 3, 4\n" in text
    none = call(*words[:1], "." * 36, *words[2:])
    assert none.status == 0 and none.out.splitlines()[-1].split()[2] == "-"
    assert call(*words[:1], "." * 36, *words[2:], "--json").json["results"][0]["share_solved"] is None


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "no puzzles in this file"),
        (["12345"], "line 1: 5 characters; a board has 81 (9x9), 36 (6x6) or 16 (4x4)"),
        (["." * 36, "." * 35], "line 2: the puzzle has 35 characters, 6x6 needs 36"),
        (["." * 35 + "7"], "line 1: '7' at character 36 of the puzzle; accepted are 1..6 and . 0 _ * - x"),
        (["11" + "." * 34], "line 1: the clues contradict each other: 1 twice in row 1"),
        (["." * 16], "no model for 4x4 boards comes with this package"),
    ],
)
def test_bad_files(call: Call, tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "bad.txt").write_text("".join(line + "\n" for line in lines))
    done = call("solve", tmp_path / "bad.txt")
    assert done.status == 1 and message in done.err and done.out == "" and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["nothere.txt"], 1, "nothere.txt: No such file or directory"),
        (["." * 80], 1, "the board given, line 1: 80 characters"),
        (["1q." * 27], 1, "the board given, line 1: 'q' at character 2"),
        (["FILE", "--loops", "0"], 2, "--loops: got '0'"),
        (["FILE", "--loops", "-1"], 2, "--loops: got '-1'"),
        (["FILE", "--order", "alphabetical"], 2, "invalid choice: 'alphabetical'"),
        (["FILE", "--loops", "1025"], 2, "--loops: got '1025', expected an integer at most 1024"),
        (["FILE", "--limit", "0"], 2, "--limit: got '0'"),
        (["FILE", "--model", "nothere"], 1, "expected a checkpoint folder or a hub id"),
        (
            ["." * 81, "--model", "SUDOKU"],
            1,
            "the model has vocab_size 7 and mask_token_id 6, but 9x9 boards need 10",
        ),
        (["FILE", "--model", "TEXT"], 1, "the model has vocab_size 258 and mask_token_id 257"),
    ],
)
def test_bad_input(
    call: Call, file: Path, sudoku_run: Path, text_run: Path, words: list[str], status: int, message: str
) -> None:
    places = {"FILE": str(file), "SUDOKU": str(sudoku_run), "TEXT": str(text_run)}
    done = call("solve", *(places.get(word, word) for word in words))
    assert done.status == status and message in done.err and done.out == "", done.err


def test_missing_shipped_checkpoint(
    call: Call, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "files", lambda package: tmp_path)
    done = call("solve", file)
    assert done.status == 1 and "the checkpoint sudoku6 does not come with this installation" in done.err


def test_files_are_told_from_boards(
    call: Call, tmp_path: Path, sudoku_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    solutions = generate(SIX, 2, seed=4, clues=(36, 36)).solutions
    name = encode_boards(SIX, solutions)[0]
    write_puzzles(name, SIX, solutions[1:])
    document = call("solve", name, "--model", sudoku_run, "--loops", 1, "--json").json
    boards = [[int(c) for c in a["answer"]] for a in document["results"][0]["answers"]]
    assert np.array_equal(boards, solutions[1:])
