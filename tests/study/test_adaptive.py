"""The studies adaptive and search: figures that agree with runs, settings chosen elsewhere, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopmdm.data.sudoku import SIX
from loopmdm.exits import ExitGate
from loopmdm.plan import ComputePlan
from loopmdm.runs.boards import held_out_puzzles
from loopmdm.runs.models import load_model
from loopmdm.solve import solve_puzzles
from loopmdm.study.adaptive.criteria import FIXED, Judge, catalogue, choose
from loopmdm.study.kit.traces import Trace, left_to_right_trace

from .conftest import interrupted_after

Study = Callable[..., tuple[int, str]]
CLOCKS = ("clock_saved", "run_seconds", "seconds")


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Of the shipped 6x6 model with at most 6 loops, 32 puzzles."""
    model = load_model("sudoku6", torch.device("cpu"))
    puzzles = held_out_puzzles(SIX, 32)
    return left_to_right_trace(model, puzzles.clues, puzzles.solutions, 6)


def table(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "table.json").read_text())
    return document


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def test_settings_are_chosen_on_one_half_and_judged_on_the_other(trace: Trace) -> None:
    """L6: some criterion saves a quarter of the loops at the quality of the cap."""
    dims = load_model("sudoku6", torch.device("cpu")).config
    choosing, reported = trace[0::2], trace[1::2]
    policies = catalogue(choosing, 6, 6)
    judge = Judge(reported, 6, dims, 36, seed=0)
    rows = {policy.name: judge.row(policy) for policy in policies}
    cap = rows[f"{FIXED} 6"]
    assert cap["gain_over_cap"] == cap["loops_saved"] == cap["flops_saved"] == 0
    for row in rows.values():
        assert row["loops_saved"] == pytest.approx(1 - row["mean_loops"] / 6)
        assert row["value_low"] <= row["value"] <= row["value_high"]
        assert row["gain_over_cap"] == pytest.approx(row["value"] - cap["value"])
    for loops in range(1, 7):
        fixed = rows[f"{FIXED} {loops}"]
        assert fixed["mean_loops"] == loops and fixed["gain_over_fixed"] == pytest.approx(0)
        assert fixed["flops_saved"] == pytest.approx((6 - loops) / 8)
    chosen = choose(policies, choosing, 6)
    assert len({policy.criterion for policy in chosen}) == len(chosen) > 3
    good = [rows[policy.name] for policy in chosen if judge.within_margin(rows[policy.name])]
    assert any(row["mean_loops"] <= 0.75 * 6 for row in good)
    # Deciding by predictions costs a tail and the head for each loop.
    for name, row in rows.items():
        if name.startswith(("output", "argmax")):
            assert row["flops_saved"] < (6 - row["mean_loops"]) / 8


def test_loops_against_t_are_the_means_of_the_states(trace: Trace) -> None:
    dims = load_model("sudoku6", torch.device("cpu")).config
    judge = Judge(trace, 6, dims, 36, seed=0)
    policies = {policy.name: policy for policy in catalogue(trace, 6, 6)}
    flat = judge.allocation(policies[f"{FIXED} 3"], 5)
    assert [row["mean_loops"] for row in flat] == [3.0] * 5
    assert [row["t"] for row in flat] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    falling = judge.allocation(policies["hidden change eps=0.15"], 5)
    assert falling[0]["mean_loops"] > falling[-1]["mean_loops"]
    stops = policies["hidden change eps=0.15"].stops(trace, 6)
    last = trace.there & (trace.place >= 0.8)
    assert falling[-1]["mean_loops"] == pytest.approx(stops[last].mean())


def test_the_study_of_boards(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["adaptive", "sudoku6", "--windows", "24", "--bins", "4", "--repeats", "1"]
    with monkeypatch.context() as patch:
        interrupted_after(patch, "adaptive", 1)
        assert study(*words, "--out", tmp_path)[0] == 130
    status, error = study(*words, "--out", tmp_path)
    assert status == 0, error
    document = table(tmp_path)
    rows = [row for row in document["rows"] if row["part"] == "quality"]
    for row in rows:
        if row["chosen"] and row["criterion"] == "hidden change":
            assert 0 <= row["run_mean_loops"] <= 6
            assert row["ledger_saved"] == pytest.approx(row["flops_saved"], abs=0.1)
    assert {"L6", "saving", "clock"} <= {finding["id"] for finding in document["findings"]}
    gate = ComputePlan.load(tmp_path / "gate.json")
    assert isinstance(gate.parts[0].compute.exit, ExitGate)
    puzzles = held_out_puzzles(SIX, 4).clues
    plan = ComputePlan.load(tmp_path / "table-plan.json")
    result = solve_puzzles(
        load_model("sudoku6", torch.device("cpu")), puzzles, SIX, num_loops=plan, order="left_to_right"
    )
    assert 1 <= result.loops.sum() / result.network_calls.sum() <= 6
    assert study(*words, "--out", tmp_path)[0] == 0
    assert timeless(table(tmp_path)["rows"]) == timeless(document["rows"])


def test_the_study_of_text(study: Study, folders: Any, corpus: str, tmp_path: Path) -> None:
    words = [
        "--data",
        corpus,
        "--windows",
        "6",
        "--num-t",
        "3",
        "--cap",
        "4",
        "--steps",
        "6",
        "--repeats",
        "1",
    ]
    status, error = study("adaptive", folders("a"), *words, "--bins", "3", "--out", tmp_path)
    assert status == 0, error
    rows = [row for row in table(tmp_path)["rows"] if row["part"] == "quality"]
    assert {row["measure"] for row in rows} == {"NELBO (nats per token)"}
    cap = next(row for row in rows if row["criterion"] == FIXED and row["setting"] == "4")
    for row in rows:
        assert row["gain_over_cap"] == pytest.approx(cap["value"] - row["value"])


def test_a_searched_plan_keeps_its_budget_and_runs(study: Study, tmp_path: Path) -> None:
    words = ["search", "sudoku6", "--loops", "2.5", "--windows", "24", "--bins", "4", "--best", "3"]
    status, error = study(*words, "--out", tmp_path)
    assert status == 0, error
    rows = table(tmp_path)["rows"]
    tables = [row for row in rows if not row["plan"].startswith("S")]
    assert len(tables) == 3 and sum(row["saved"] for row in rows) == 1
    losses = [row["searched_loss"] for row in tables]
    assert losses == sorted(losses)
    fixed = {row["plan"]: row for row in rows if row["plan"].startswith("S")}
    assert set(fixed) == {"S = 2", "S = 3", "S = 6"}
    assert losses[0] < fixed["S = 2"]["searched_loss"]
    for row in rows:
        assert row["share of boards not solved"] == row["share of boards not solved (proxy)"]
    for row in tables:
        assert 2 < row["mean_loops"] < 2.8  # 2.5 on the puzzles it was searched on
    saved = ComputePlan.load(tmp_path / "plan.json")
    chosen = next(row for row in tables if row["saved"])
    entries = [saved.at_time(1 - (index + 0.5) / 4).num_loops for index in range(4)]
    assert chosen["plan"] == ",".join(map(str, entries))


def test_a_search_on_text_without_a_scorer(study: Study, folders: Any, corpus: str, tmp_path: Path) -> None:
    words = ["--loops", "2", "--data", corpus, "--windows", "4", "--num-t", "4", "--bins", "2", "--best", "2"]
    status, error = study("search", folders("a"), *words, "--out", tmp_path)
    assert status == 0, error
    rows = table(tmp_path)["rows"]
    assert np.argmin([row["searched_loss"] for row in rows if "," in row["plan"]]) == 0 and rows[0]["saved"]
    assert ComputePlan.load(tmp_path / "plan.json").reading == "masks"


@pytest.mark.parametrize("name", ["search", "adaptive"])
def test_whole_boards_are_judged_by_their_likelihood(study: Study, tmp_path: Path, name: str) -> None:
    words = ["--whole-boards", "--windows", "6", "--num-t", "4", "--bins", "2", "--cap", "3", "--steps", "6"]
    words += ["--loops", "2", "--num", "6"] if name == "search" else ["--repeats", "1"]
    status, error = study(name, "sudoku6", *words, "--out", tmp_path)
    assert status == 0, error
    rows = table(tmp_path)["rows"]
    if name == "search":
        assert all(0 < row["rows, columns and boxes wrong"] <= 1 for row in rows)
        assert {row["measure"] for row in rows} == {"NELBO (nats per token)"}
    else:
        fixed = {row["setting"]: row["value"] for row in rows if row.get("criterion") == "fixed S"}
        assert set(map(str, fixed)) == {"1", "2", "3"} and min(fixed.values()) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adaptive", "sudoku6", "--cap", "1"], "--cap: got 1: with one loop there is nothing to stop"),
        (["adaptive", "sudoku6", "--windows", "3"], "--windows: got 3, expected at least 4"),
        (["search", "sudoku6", "--loops", "7"], "--loops: got 7, expected 1 to 6"),
        (["search", "sudoku6", "--loops", "0.5"], "--loops: got 0.5, expected 1 to 6"),
    ],
)
def test_bad_usage(study: Study, tmp_path: Path, words: list[str], message: str) -> None:
    status, error = study(*words, "--out", tmp_path)
    assert status == 2 and message in error.splitlines()[-1]
