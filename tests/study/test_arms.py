"""Arms of one FLOP budget: their shapes, their steps, and that a study which was stopped goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from loopmdm.cli import main
from loopmdm.data.corpus import Corpus, CorpusData
from loopmdm.model import LoopMDM, flops
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.loop_law import LoopLaw
from loopmdm.quality.likelihood import evaluate_nll
from loopmdm.runs import text_data
from loopmdm.runs.recipes import SUDOKU_RECIPES
from loopmdm.runs.run_file import RunFile
from loopmdm.study.training.arms import Arm, Budget, iso_flop_arms, position_arms, steps_within, train_arm
from loopmdm.study.training.binomial import wilson
from loopmdm.train import read_metrics

SMALL = LoopMDMConfig.preset("small", vocab_size=50258, mask_token_id=50257)
SUDOKU = LoopMDMConfig.preset("sudoku6")
TINY = ["--hidden", "16", "--heads", "2", "--batch-size", "8", "--num", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that make few puzzles."""
    recipe = dataclasses.replace(SUDOKU_RECIPES["sudoku6"], pool_size=64)
    monkeypatch.setitem(SUDOKU_RECIPES, "sudoku6", recipe)


def test_iso_flop_arms_are_those_of_the_papers() -> None:
    """18 layers beside 12 that loop two with S to 4; 5 beside 3 that loop one with S to 6."""
    loops = LoopLaw.uniform(4).mean
    base, deep, loop = iso_flop_arms(SMALL, loops)
    assert base.model == {"max_loops": 1} and loop.model == {}
    assert deep.model == {"max_loops": 1, "num_layers": 15}
    assert iso_flop_arms(SUDOKU, 3.5)[1].model["num_layers"] == 5


def test_positions_of_a_deep_and_of_a_shallow_model() -> None:
    def ranges(config: LoopMDMConfig) -> dict[str, tuple[int, int]]:
        return {arm.name: (arm.model["loop_start"], arm.model["loop_end"]) for arm in position_arms(config)}

    assert ranges(SMALL) == {
        "early": (0, 2),
        "early-middle": (1, 3),
        "middle": (5, 7),
        "late": (10, 12),
        "all": (0, 12),
    }
    assert ranges(SUDOKU) == {"early": (0, 1), "early-middle": (1, 2), "late": (2, 3), "all": (0, 3)}
    with pytest.raises(ValueError, match="the model loops 3 of its 3 layers"):
        position_arms(LoopMDMConfig.preset("sudoku6", loop_start=0, loop_end=3))


@pytest.mark.parametrize("convention", flops.CONVENTIONS)
def test_the_steps_of_an_arm_spend_its_budget(convention: flops.Convention) -> None:
    law, seed, batch = LoopLaw.uniform(6), 5, 64
    costs = [
        batch * flops.training_flops(SUDOKU, 36, law.sample(seed, step), convention) for step in range(200)
    ]
    for wanted in (1, 7, 113):
        budget = Budget(sum(costs[:wanted]), convention)
        assert steps_within(budget, SUDOKU, 36, batch, law, seed) == wanted
    # Half of the next step more is still nearer to `wanted` steps than to the next number.
    budget = Budget(sum(costs[:7]) + 0.49 * costs[7], convention)
    assert steps_within(budget, SUDOKU, 36, batch, law, seed) == 7
    with pytest.raises(ValueError, match="does not pay for one step of 64 sequences"):
        steps_within(Budget(costs[0] / 3, convention), SUDOKU, 36, batch, law, seed)


def test_expected_steps_are_those_of_matched_steps() -> None:
    law, length, batch = LoopLaw.uniform(6), 36, 64
    base = steps_within(Budget(2e12), SUDOKU, length, batch, LoopLaw.uniform(1), 0)
    looped = steps_within(Budget(2e12), SUDOKU, length, batch, law, 0)
    assert looped == pytest.approx(flops.matched_steps(base, SUDOKU, length), rel=0.05)


def test_an_arm_goes_on_where_it_stopped_and_refuses_another_run(tmp_path: Path) -> None:
    base = RunFile("sudoku6", {"hidden_size": 16, "num_heads": 2}, {"batch_size": 4, "log_every": 1})
    budget, arm = Budget(1.5e8), Arm("loop")
    whole = train_arm(base, arm, budget, 3, tmp_path / "whole")
    assert whole.steps > 2
    recorded = [record["flops"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert recorded[-1] == pytest.approx(whole.flops["blocks+head"])
    assert abs(recorded[-1] - budget.flops) <= 0.5 * max(
        flops.training_flops(whole.model.config, 36, 6) * 4, recorded[-1] - recorded[-2]
    )
    modified = (tmp_path / "whole" / "training_state.safetensors").stat().st_mtime_ns
    again = train_arm(base, arm, budget, 3, tmp_path / "whole")
    assert (tmp_path / "whole" / "training_state.safetensors").stat().st_mtime_ns == modified
    assert again.to_dict() == whole.to_dict()
    with pytest.raises(ValueError, match=r"holds another run \(training differ\)"):
        train_arm(base, arm, Budget(3e8), 3, tmp_path / "whole")


def test_an_arm_may_come_from_the_training_command(tmp_path: Path) -> None:
    """With other times of records and checkpoints, which no weight depends on."""
    base = RunFile("sudoku6", {"hidden_size": 16, "num_heads": 2}, {"batch_size": 4}, clues="12:20")
    budget, arm = Budget(1.5e8), Arm("loop")
    expected = train_arm(base, arm, budget, 3, tmp_path / "expected")
    words = [
        "--hidden",
        16,
        "--heads",
        2,
        "--batch-size",
        4,
        "--clues",
        "12:20",
        "--seed",
        3,
        "--log-every",
        2,
    ]
    words += ["--steps", expected.steps, "--eval-every", 0, "--eval-size", 2, "--threads", 1]
    folder = tmp_path / "command"
    assert main(["train", "--preset", "sudoku6", "--out", *map(str, [folder, *words])]) == 0
    written = (folder / "training_state.safetensors").stat().st_mtime_ns
    found = train_arm(base, arm, budget, 3, folder)
    assert (folder / "training_state.safetensors").stat().st_mtime_ns == written
    assert found.run == expected.run and found.flops == expected.flops
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())


def test_a_study_of_arms_resumes_and_compares(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["study", "isoflop", "--flops", "2e8", "--out", str(tmp_path / "iso"), "--loops", "1,2", *TINY]
    assert main(command) == 0, capfd.readouterr().err
    table = json.loads((tmp_path / "iso" / "table.json").read_text())
    rows = table["rows"]
    # Two orders; the looped arm at two loop counts.
    assert [(row["arm"], row["num_loops"]) for row in rows if row["order"] == "confidence"] == [
        ("base", 1),
        ("deep", 1),
        ("loop", 1),
        ("loop", 2),
    ]
    for row in rows:
        assert row["training FLOPs, blocks+head"] == pytest.approx(2e8, rel=0.2)
        assert row["low"] <= row["value"] <= row["high"] and row["boards"] == 3
    costs = {row["arm"]: row["FLOPs of a network call"] for row in rows if row["num_loops"] == 1}
    assert costs["base"] == costs["loop"] < costs["deep"]
    assert {finding["id"] for finding in table["findings"]} == {"L3", "L4"}
    assert main(command) == 0
    assert json.loads((tmp_path / "iso" / "table.json").read_text()) == table
    assert main([*command, "--seeds", "1"]) == 2
    assert "seeds was [0], is [1]" in capfd.readouterr().err


def test_arms_by_name_on_boards_of_given_clues(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["study", "isoflop", "--flops", "2e8", "--clues", "20:24", "--arms", "loop", "base", *TINY]
    assert main([*words, "--loops", "2", "--out", str(tmp_path / "iso")]) == 0, capfd.readouterr().err
    table = json.loads((tmp_path / "iso" / "table.json").read_text())
    assert [row["arm"] for row in table["rows"]] == ["base", "base", "loop", "loop"]
    assert {finding["id"] for finding in table["findings"]} == {"L3"}
    for row in table["rows"]:  # a blank a call
        assert 12 * row["boards"] <= row["network_calls"] <= 16 * row["boards"]
    run = RunFile.read(tmp_path / "iso" / "arms" / "base-seed0")
    assert run is not None and run.clues == "20:24"


def test_arms_on_a_corpus_are_those_on_its_text(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = Path(corpus).read_text()
    lines = [json.dumps({"text": text[start : start + 100]}) for start in range(0, len(text), 100)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    built = [
        "data",
        "build",
        "--data",
        str(tmp_path / "text.jsonl"),
        "--validation",
        "0.4",
        "--out",
        str(tmp_path / "corpus"),
    ]
    assert main(built) == 0, capfd.readouterr().err
    words = ["study", "isoflop", "--preset", "text", "--length", "16", "--flops", "2e7", "--num-t", "2"]
    words += ["--max-loops", "2", "--loops", "2", *TINY, "--batch-size", "2", "--arms", "loop"]
    assert main([*words, "--data", str(tmp_path / "corpus"), "--out", str(tmp_path / "iso")]) == 0
    (row,) = json.loads((tmp_path / "iso" / "table.json").read_text())["rows"]
    folder = tmp_path / "iso" / "arms" / "loop-seed0"
    data = CorpusData([Corpus(tmp_path / "corpus")], 16, part="validation")
    windows = text_data.windows(data, Corpus(tmp_path / "corpus").tokenizer, row["windows"])
    (expected,) = evaluate_nll(
        LoopMDM.from_pretrained(folder), windows.batches, num_loops=[2], num_t=2, bytes_per_token=1.0
    )
    assert row["value"] == pytest.approx(expected.nll, rel=1e-6) and row["bits_per_byte"] > 0


def test_positions_on_text(corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "text", "--data", corpus, "--length", "16", "--layers", "3", "--loop", "1:2"]
    words += ["--flops", "4e7", "--validation", "0.4", "--num-t", "2", "--max-loops", "2", "--loops", "2"]
    command = ["study", "position", *words, *TINY, "--batch-size", "2", "--out", str(tmp_path)]
    assert main(command) == 0, capfd.readouterr().err
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["arm"], row["looped"], row["num_loops"]) for row in rows] == [
        ("early", "0:1", 2),
        ("early-middle", "1:2", 2),
        ("late", "2:3", 2),
        ("all", "0:3", 2),
    ]
    assert rows[0]["steps"] == rows[2]["steps"] > rows[3]["steps"]
    for row in rows:
        model = LoopMDM.from_pretrained(tmp_path / "arms" / f"{row['arm']}-seed0")
        assert row["low"] < row["value"] < row["high"] and model.config.num_layers == 3


@pytest.mark.parametrize("form", ["text", "corpus"])
def test_an_arm_is_judged_before_it_is_begun(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    """Nothing of it is written, and the options put right are taken in the same folder."""
    data = corpus
    if form == "corpus":
        data = str(tmp_path / "corpus")
        text = Path(corpus).read_text()
        lines = [json.dumps({"text": text[start : start + 100]}) for start in range(0, len(text), 100)]
        (tmp_path / "text.jsonl").write_text("\n".join(lines))
        words = ["data", "build", "--data", str(tmp_path / "text.jsonl"), "--validation", "0.4"]
        assert main([*words, "--out", data]) == 0
    words = ["study", "position", "--preset", "text", "--data", data, "--length", "16", *TINY]
    words += ["--layers", "3", "--loop", "1:2", "--out", str(tmp_path / "out")]
    for wrong, message in (
        (["--flops", "1"], "--flops: a budget of 1 FLOPs does not pay for one step"),
        (["--flops", "2"], "--flops: a budget of 2 FLOPs does not pay for one step"),
        (["--heads", "5"], "--hidden: hidden_size: got 16, expected a multiple of"),
        (["--loop-law", "fixed:0"], "--loop-law: S of the loop law 'fixed:0' must be at least 1"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capfd.readouterr().err
        assert not list(tmp_path.rglob("out/**/run.json"))
        assert not list(tmp_path.rglob("out/**/*tokenizer.json"))


def test_arms_are_not_trained_where_nothing_is_held_out(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    built, out = str(tmp_path / "corpus"), tmp_path / "out"
    assert main(["data", "build", "--data", corpus, "--validation", "0", "--out", built]) == 0
    words = ["study", "isoflop", "--preset", "text", "--length", "16", *TINY, "--out", str(out)]
    assert main([*words, "--data", corpus, "--validation", "0"]) == 2
    assert "--validation: got 0, but arms are judged by held-out text" in capfd.readouterr().err
    assert main([*words, "--data", built]) == 1
    assert f"--data: {built} holds nothing out" in capfd.readouterr().err
    assert not list(out.rglob("run.json"))


def test_bad_usage_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, (words, message) in enumerate(
        [
            (["isoflop", "--preset", "text"], "--preset text trains on text: give --data PATH"),
            (["position", "--data", "stdlib"], "--preset sudoku6 makes its own data"),
            (["position", "--loop", "0:3", *TINY], "the model loops 3 of its 3 layers"),
            (["isoflop", "--flops", "1", *TINY], "does not pay for one step"),
            (["isoflop", "--loop-law", "often", *TINY], "loop law is 'often'"),
            (["isoflop", "--arms", "base", "wide", *TINY], "--arms: wide not among base, deep, loop"),
            (["isoflop", "--clues", "40:50", *TINY], "--clues: got '40:50', expected"),
            (["isoflop", "--preset", "text", "--data", "stdlib", "--clues", "9:9"], "leave out --clues"),
        ]
    ):
        assert main(["study", *words, "--out", str(tmp_path / str(number))]) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert message in error and error.startswith("loopmdm study")


def test_wilson_intervals() -> None:
    low, high = wilson(90, 100)
    assert (low, high) == (pytest.approx(0.8256343384950865), pytest.approx(0.9447708291352905))
    assert wilson(0, 20)[0] == 0 and 0.1 < wilson(0, 20)[1] < 0.2
    assert wilson(20, 20)[1] == 1
    with pytest.raises(ValueError, match="successes is 3, trials is 2"):
        wilson(3, 2)
