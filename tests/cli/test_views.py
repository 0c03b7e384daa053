"""`--watch` and `--html` of `sample` and `solve`: they show the run, and the results stay the same."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm import LoopMDM, sample
from loopmdm.cli import solve
from loopmdm.data.sudoku import SIX, encode_boards, generate, write_puzzles
from loopmdm.sampling.sampler import sample_with

from .conftest import Call

STEP = re.compile(
    r"step (\d+)/(\d+)  loops (\d+)  masked (\d+) of (\d+)  network calls (\d+)  [\d.]+ s  (.*)"
)


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text("utf-8"))
    assert found is not None
    document: dict[str, Any] = json.loads(found[1])
    return document


@pytest.fixture
def puzzles(tmp_path: Path) -> Path:
    made = generate(SIX, 4, seed=1, clues=(20, 30))
    write_puzzles(tmp_path / "six.txt", SIX, made.clues)
    return tmp_path / "six.txt"


@pytest.mark.parametrize("boards", [1, 2, 5])
def test_what_is_watched_is_solved_once(
    call: Call, sudoku_run: Path, puzzles: Path, monkeypatch: pytest.MonkeyPatch, boards: int
) -> None:
    solved: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        solved.append(len(options["infill"]))
        return sample_with(*args, **options)

    for module in ("loopmdm.solve", "loopmdm.cli.solve"):
        monkeypatch.setattr(f"{module}.sample_with", counted)
    words = ["solve", puzzles, "--model", sudoku_run, "--loops", "1,2", "--json", "--boards", boards]
    plain = call(*words).json
    assert sum(solved) == 2 * 2 * 4  # orders, loop counts, puzzles
    solved.clear()
    start = time.perf_counter()
    shown = call(*words, "--watch", "--watch-delay", "0.1").json
    assert sum(solved) == 2 * 2 * 4
    seconds = [result.pop("seconds") for result in shown["results"]]
    assert time.perf_counter() - start > seconds[-1] + 0.5  # waiting is not in the figures
    for result in plain["results"]:
        del result["seconds"]
    assert shown == plain


def test_watching_prints_lines_where_standard_error_is_no_terminal(call: Call, text_run: Path) -> None:
    words = ["sample", text_run, "--num", 2, "--length", 12, "--order", "left_to_right", "--prompt", "Te"]
    plain, watched = call(*words), call(*words, "--watch")
    assert watched.status == 0 and watched.out == plain.out
    *lines, last = watched.err.splitlines()
    found = [match.groups() for match in map(STEP.fullmatch, lines) if match is not None]
    assert len(found) == len(lines) == 9
    for step, (number, total, loops, left, fill, calls, text) in enumerate(found, start=1):
        assert (int(number), int(total), int(loops)) == (step, 9, 2)
        assert (int(left), int(fill), int(calls)) == (18 - 2 * step, 18, 2 * step)
        assert text.startswith("⟨eos⟩Te") and text.endswith("·" * (9 - step))
    assert "18 network calls" in last


def test_json_stays_one_document(call: Call, text_run: Path, tmp_path: Path) -> None:
    words = ["sample", text_run, "--num", 1, "--length", 8, "--json"]
    plain, shown = call(*words), call(*words, "--watch", "--html", tmp_path / "run.html")
    assert shown.status == 0, shown.err
    assert shown.json["samples"] == plain.json["samples"]
    assert shown.json["network_calls"] == plain.json["network_calls"]


@pytest.mark.parametrize("start", [["--prompt", "ab"], ["--infill", "a____b [MASK]"], []])
def test_the_page_is_the_run(call: Call, text_run: Path, tmp_path: Path, start: list[str]) -> None:
    file = tmp_path / "run.html"
    length = [] if "--infill" in start else ["--length", 10]
    words = ["--num", 2, "--seed", 3, "--steps", 6, "--html", file, "--html-loops", 2]
    done = call("sample", text_run, *start, *length, *words, "--json")
    assert done.status == 0 and f"wrote {file} (" in done.err, done.err
    data = data_of(file)
    canvas = torch.tensor(data["canvas"])
    result = sample(
        LoopMDM.from_pretrained(text_run), infill=canvas, steps=6, seed=3, history=True, progress=False
    )
    assert [one["ids"] for one in done.json["samples"]] == result.tokens.tolist()
    assert [(e["step"], e["positions"], e["tokens"]) for e in data["events"]] == [
        (e.step, e.positions.tolist(), e.tokens.tolist()) for e in result.history or []
    ]
    assert len(data["predictions"]) == 2
    assert all(len(one["tokens"]) == len(one["probs"]) == 2 for one in data["predictions"].values())
    facts = dict(data["facts"])
    assert (facts["order"], facts["seed"], facts["steps"]) == ("ancestral", "3", "6")
    assert facts["network calls"] == str(result.total_network_calls)


def test_without_predictions_and_without_tokenizer(call: Call, sudoku_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "run.html"
    words = ["--html", file, "--html-loops", 0, "--watch"]
    board = call("sample", sudoku_run, "--num", 1, *words)
    assert board.status == 0, board.err
    assert data_of(file)["board"] == [2, 3]
    done = call("sample", sudoku_run, "--num", 1, "--length", 35, *words)
    assert done.status == 0, done.err
    data = data_of(file)
    assert data["predictions"] == {} and data["separator"] == " " and data["symbols"]["3"] == "3"


def test_solving_shows_the_boards_whose_answers_are_printed(
    call: Call, puzzles: Path, sudoku_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "boards.html"
    words = ["solve", puzzles, "--model", sudoku_run, "--loops", "1,2", "--boards", 2, "--json"]
    plain, shown = call(*words), call(*words, "--watch", "--html", file)
    assert shown.status == 0, shown.err
    answers = [[one["answer"] for one in result["answers"]] for result in shown.json["results"]]
    assert answers == [[one["answer"] for one in result["answers"]] for result in plain.json["results"]]
    lines = [match for match in map(STEP.fullmatch, shown.err.splitlines()) if match is not None]
    assert lines[-1][7] == answers[-1][0] and {line[3] for line in lines} == {"2"}
    data = data_of(file)
    assert data["board"] == [2, 3] and data["titles"] == ["line 1", "line 2"]
    boards = [["·" if token == 6 else str(token + 1) for token in row] for row in data["canvas"]]
    clues = encode_boards(SIX, generate(SIX, 4, seed=1, clues=(20, 30)).clues[:2])
    assert ["".join(board).replace("·", ".") for board in boards] == clues
    for event in data["events"]:
        for b, position, token in zip(event["sequences"], event["positions"], event["tokens"], strict=True):
            boards[b][position] = str(token + 1)
    assert ["".join(board) for board in boards] == answers[-1][:2]


def test_a_model_of_other_boards_is_refused_as_ever(call: Call, puzzles: Path, text_run: Path) -> None:
    done = call("solve", puzzles, "--model", text_run, "--watch")
    assert done.status == 1 and "the model has vocab_size 258" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("command", ["sample", "solve"])
def test_help_says_what_the_page_costs(call: Call, command: str) -> None:
    text = " ".join(call(command, "--help").out.split())
    assert "--watch-samples N" in text and "--watch-delay SECONDS" in text and "--html FILE" in text
    assert "this runs the network K S times more for each of the" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--watch-samples", "2"], "--watch-samples: it belongs to --watch"),
        (["--watch-delay", "1"], "--watch-delay: it belongs to --watch"),
        (["--html", "FOLDER"], "FOLDER: it is a folder, expected a file to write"),
        (["--html", "FILE/run.html"], "FILE is not a folder that can be written to"),
        (["--watch", "--watch-samples", "0"], "--watch-samples: got '0'"),
        (["--watch", "--watch-delay", "-1"], "--watch-delay: got '-1'"),
        (["--html-loops", "-1"], "--html-loops: got '-1'"),
    ],
)
def test_bad_options(call: Call, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    places = {"FOLDER": str(tmp_path / "folder"), "FILE": str(tmp_path / "file")}
    for name, place in places.items():
        words, message = [word.replace(name, place) for word in words], message.replace(name, place)
    for command in (["sample", "nothere"], ["solve", "." * 36]):
        done = call(*command, *words)
        assert done.status == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_failing_run_leaves_no_page(
    call: Call, text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.html"
    assert call("sample", text_run, "--length", 33, "--html", file, "--watch").status == 2

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    done = call("sample", text_run, "--length", 8, "--num", 1, "--html", file)
    assert done.status == 1 and "No space left on device" in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_solving_without_views_samples_nothing_else(
    call: Call, puzzles: Path, sudoku_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Callable[..., Any]:
        raise AssertionError("sampled for a view that nobody asked for")

    monkeypatch.setattr(solve, "sample_with", refuse)
    assert call("solve", puzzles, "--model", sudoku_run, "--loops", "1").status == 0
