"""Plans on the command line: what runs is what the library makes of them; errors are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loopmdm import ComputePlan, LoopMDM, sample
from loopmdm.data.sudoku import SIX, encode_boards, generate

from .conftest import Call

COMMON = ["--num", 2, "--length", 12, "--seed", 3, "--order", "confidence", "--json"]


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        ([], None),
        (["--plan", 3], 3),
        (["--plan", "S1:4,S3:8"], "S1:4,S3:8"),
        (["--plan", "L4,H8", "--light", 1, "--heavy", 3], ComputePlan.parse("L4,H8", 1, 3)),
        (["--adaptive", 0.01], ComputePlan.adaptive(0.01)),
        (["--adaptive", "inf", "--plan", 5, "--min-loops", 3], ComputePlan.adaptive(float("inf"), 5, 3)),
        (["--adaptive", 0.1, "--criterion", "output"], ComputePlan.adaptive(0.1, criterion="output")),
        (["--criterion", "argmax", "--loops", 4], ComputePlan.adaptive(None, 4, criterion="argmax")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_plans_reach_the_library(call: Call, text_run: Path, words, plan) -> None:
    done = call("sample", text_run, *COMMON, *words)
    assert done.status == 0, done.err
    expected = sample(LoopMDM.from_pretrained(text_run), 2, 12, order="confidence", seed=3, plan=plan)
    assert [s["ids"] for s in done.json["samples"]] == expected.tokens.tolist()
    assert done.json["loops"] == expected.loops.tolist()
    assert done.json["plan"] == str(expected.plan)
    assert ComputePlan.from_json(json.dumps(done.json["plan_json"])) == expected.plan
    assert done.json["ledger"] == expected.ledger.report()


def test_files_and_models(call: Call, text_run: Path, tmp_path: Path) -> None:
    model = LoopMDM.from_pretrained(text_run)
    ComputePlan.parse("S1:5,S2:7").save(tmp_path / "table.json")
    done = call("sample", text_run, *COMMON, "--plan", tmp_path / "table.json")
    assert done.json["plan"] == "(S1:5,S2:7)" and done.json["loops"] == [19, 19]
    words = ["--light", text_run, "--heavy", text_run]
    both = call("sample", text_run, *COMMON, "--plan", "L5,H7", *words)
    plain = sample(model, 2, 12, order="confidence", seed=3)
    assert [s["ids"] for s in both.json["samples"]] == plain.tokens.tolist()
    ComputePlan.parse("L5,H7", model, model).save(tmp_path / "models.json")
    stored = call("sample", text_run, *COMMON, "--plan", tmp_path / "models.json", *words)
    assert stored.json["samples"] == both.json["samples"]
    done = call("sample", text_run, *COMMON, "--plan", tmp_path / "models.json")
    assert done.status == 2 and "the plan needs the model 'L'" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "S1:5,X7"], "cannot read 'X7'"),
        (["--plan", "L5,H7", "--light", 1], "heavy is not given"),
        (["--plan", "S1:5,S2:8"], "covers 13 steps, but sampling takes 12 steps"),
        (["--plan", "2000"], "must be in 1..1024, got 2000"),
        (["--plan", "nowhere.json"], "cannot read 'nowhere.json'"),
        (["--light", 2], "they belong to a plan"),
        (["--adaptive", "-0.1"], "expected a number of at least 0, or inf"),
        (["--adaptive", "nan"], "expected a number of at least 0, or inf"),
        (["--adaptive", "0.1", "--plan", "S1:5,S2:7"], "it is the most loops, a count"),
        (["--adaptive", "0.1", "--criterion", "argmax"], "argmax has no threshold"),
        (["--adaptive", "0.1", "--light", 1], "do not go with --adaptive"),
        (["--adaptive", "0.1", "--plan", 2, "--min-loops", 3], "min_loops is 3, beyond max_loops 2"),
        (["--criterion", "output"], "it needs a threshold"),
        (["--min-loops", 2], "it belongs to --adaptive"),
    ],
)
def test_bad_plans_are_one_line(call: Call, text_run: Path, words, message) -> None:
    done = call("sample", text_run, *COMMON, "--steps", 12, *words)
    assert done.status == 2 and message in done.err and done.out == ""
    assert len(done.err.strip().splitlines()) == 1


def test_an_unreadable_file_is_one_line(call: Call, text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    done = call("sample", text_run, *COMMON, "--plan", tmp_path / "plan.json")
    assert done.status == 2 and "plan.json: not a plan" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_boards(call: Call, sudoku_run: Path) -> None:
    board = encode_boards(SIX, generate(SIX, 1, seed=5, clues=None).clues)[0]
    blanks = board.count(".")
    words = ["solve", board, "--model", sudoku_run, "--order", "confidence"]
    done = call(*words, "--adaptive", "inf", "--min-loops", 2, "--loops", "2,3", "--json")
    assert done.status == 0, done.err
    assert [r["loops"] for r in done.json["results"]] == [2 * blanks] * 2
    assert [r["num_loops"] for r in done.json["results"]] == [None, None]
    assert done.json["results"][1]["plan"] == "adaptive(eps=inf, max_loops=3, min_loops=2)"
    scheduled = call(*words, "--plan", f"S1:4,S3:{blanks - 4}")
    assert scheduled.status == 0 and f"Answers at (S1:4,S3:{blanks - 4}), confidence order" in scheduled.out
    for bad, message in (
        (["--plan", "3", "--loops", "2"], "--loops: it does not go with --plan"),
        (["--plan", "S1:4,S3"], "cannot read 'S3'"),
        (["--light", "2"], "they belong to a plan"),
        (["--min-loops", "2"], "it belongs to --adaptive"),
    ):
        done = call(*words, *bad)
        assert done.status == 2 and message in done.err
