"""The schedules study: what it saves, what its proxy foretells, pairing, prefixes, resuming, bad usage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopmdm import sample
from loopmdm.data.sudoku import SIX
from loopmdm.data.sudoku.boards import units
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.model import LoopMDM
from loopmdm.model.flops import head_flops, layer_flops, schedule_saving
from loopmdm.plan import ComputePlan
from loopmdm.quality import distinct_n, load_scorer, unigram_entropy
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.runs.boards import held_out_puzzles
from loopmdm.runs.models import load_model
from loopmdm.solve import solve_puzzles
from loopmdm.study.kit.scoring import TextScoring

from .conftest import interrupted_after

Study = Callable[..., tuple[int, str]]
UNITS = "rows, columns and boxes wrong"
CLOCKS = ("seconds", "clock_saved")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoregressive model with random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("scorer"), ByteTokenizer()
    torch.manual_seed(0)
    model = CausalLM(CausalConfig(tokenizer.vocab_size, tokenizer.mask_token_id, 16, 2, 1, max_length=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


def table(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "table.json").read_text())
    return document


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def test_whole_boards_are_rated_by_their_wrong_units(study: Study, tmp_path: Path) -> None:
    words = ["--windows", "4", "--steps", "8", "--segments", "4", "--light-segments", "1", "--repeats", "1"]
    words += ["--whole-boards", "--num", "20", "--num-t", "4"]
    status, error = study("schedules", "sudoku6@3", "sudoku6@1", *words, "--out", tmp_path)
    assert status == 0, error
    document = table(tmp_path)
    rows = {row["name"]: row for row in document["rows"] if row["part"] != "segment"}
    assert len(rows) == 7 + 4 and len({row["network_calls"] for row in rows.values()}) == 1
    model = load_model("sudoku6", torch.device("cpu"))
    for name, num_loops in (("all heavy", 3), ("all light", 1)):
        boards = sample(model, 20, 36, 8, plan=num_loops, seed=0, progress=False).tokens.numpy()
        wrong = [sum(len(set(board[unit])) < 6 for unit in units(SIX)) / 18 for board in boards]
        assert rows[name][UNITS] == pytest.approx(np.mean(wrong), abs=1e-5)
    assert rows["all light"]["NELBO (nats per token)"] > rows["all heavy"]["NELBO (nats per token)"]
    assert document["provenance"]["samples"] == 20


def test_boards_the_proxy_is_what_sampling_gives(study: Study, tmp_path: Path) -> None:
    words = ["--windows", "8", "--steps", "28", "--segments", "4", "--light-segments", "2", "--repeats", "1"]
    status, error = study("schedules", "sudoku6@6", "sudoku6@1", *words, "--out", tmp_path)
    assert status == 0, error
    rows = table(tmp_path)["rows"]
    schedules = [row for row in rows if row["part"] != "segment"]
    assert len(schedules) == 7 + 6
    measure = "share of boards not solved"
    for row in schedules:
        assert row[measure] == row[f"{measure} (proxy)"]
    assert len({row[measure] for row in schedules}) > 2
    assert len({row["network_calls"] for row in schedules}) == 1
    by_name = {row["name"]: row for row in schedules}
    model = load_model("sudoku6", torch.device("cpu"))
    puzzles = held_out_puzzles(SIX, 8).clues
    for name, loops in (("all heavy", 6), ("all light", 1)):
        result = solve_puzzles(model, puzzles, SIX, num_loops=loops, order="left_to_right", steps=28)
        assert by_name[name][measure] == pytest.approx(1 - result.accuracy)
        assert by_name[name]["mean_loops"] == loops
    assert by_name["all light"]["saved, blocks"] == pytest.approx(5 / 8)
    assert by_name["LHLH"]["plan"] == "L7,H7,L7,H7"
    assert by_name["LHLH"]["saved, blocks"] == pytest.approx(5 / 16)
    segments = [row for row in rows if row["part"] == "segment"]
    influence = [row[f"{measure}, influence"] for row in segments]
    enumerated = [row for row in schedules if row["part"] == "enumerated"]
    mean = np.mean([row[measure] for row in enumerated])
    for j, value in enumerate(influence):
        light = [row[measure] for row in enumerated if row["name"][j] == "L"]
        assert value == pytest.approx(np.mean(light) - mean)
    best = ComputePlan.load(tmp_path / "best-plan.json")
    ranks = sorted(enumerated, key=lambda row: row[measure])
    assert best.num_steps == 28 and ranks[0]["plan"] in str(best)


def test_two_models_of_text(study: Study, folders: Any, corpus: str, scorer: str, tmp_path: Path) -> None:
    """M5's ledger, M7's metrics, M8's calls and E14: all heavy is the plain sampler."""
    words = ["--data", corpus, "--windows", "3", "--scorer", scorer, "--num", "5", "--steps", "8"]
    words += ["--segments", "4", "--light-segments", "1", "--num-t", "8", "--repeats", "1"]
    status, error = study("schedules", folders("a"), f"{folders('c')}@1", *words, "--out", tmp_path / "x")
    assert status == 0, error
    document = table(tmp_path / "x")
    rows = {row["name"]: row for row in document["rows"] if row["part"] != "segment"}
    heavy = load_model(folders("a"), torch.device("cpu"))
    # Heavy: 4 layers, of them 2 three times; light: 3 layers, once.
    head = head_flops(heavy.config) / layer_flops(heavy.config, 16)
    assert rows["light in quarter 2"]["saved, blocks"] == pytest.approx(schedule_saving(0.25, 3, 8))
    assert rows["sandwich"]["saved, blocks"] == pytest.approx(schedule_saving(0.25, 3, 8))
    assert rows["sandwich"]["saved, blocks+head"] == pytest.approx(
        schedule_saving(0.25, 3, 8, outside_blocks=head)
    )
    result = sample(heavy, 5, 16, 8, seed=0, progress=False)
    assert rows["all heavy"]["network_calls"] == result.total_network_calls
    assert rows["all heavy"]["unigram_entropy"] == pytest.approx(float(unigram_entropy(result.tokens).mean()))
    assert rows["all heavy"]["distinct_2"] == pytest.approx(float(distinct_n(result.tokens, 2).mean()))
    nll, counted = load_scorer(scorer).nll(result.tokens)
    assert rows["all heavy"]["generative perplexity"] == pytest.approx(
        float((nll / counted).mean().exp()), rel=1e-5
    )
    # The reveals are drawn before the network is asked: every schedule runs it as often.
    assert len({row["network_calls"] for row in rows.values()}) == 1
    assert document["provenance"]["expected network calls of a sequence"] == pytest.approx(
        8 * (1 - (7 / 8) ** 16)
    )
    all_light = rows["all light"]["NELBO (nats per token)"]
    all_heavy = rows["all heavy"]["NELBO (nats per token)"]
    one = [rows[name]["NELBO (nats per token)"] for name in ("LHHH", "HLHH", "HHLH", "HHHL")]
    assert sum(value - all_heavy for value in one) == pytest.approx(all_light - all_heavy)
    assert {finding["id"] for finding in document["findings"]} == {"M3", "M5"}


def test_an_interrupted_study_goes_on_to_the_same_table(
    study: Study, folders: Any, corpus: str, scorer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["schedules", folders("a"), f"{folders('a')}@1", "--data", corpus, "--windows", "3"]
    words += ["--scorer", scorer, "--num", "3", "--steps", "20", "--prefix", "4", "--repeats", "0"]
    words += ["--light-segments", "9", "--num-t", "4"]
    assert study(*words, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, "schedules", 5)
        assert study(*words, "--out", tmp_path / "parts")[0] == 130
    assert len((tmp_path / "parts" / "items.jsonl").read_text().splitlines()) >= 6
    assert study(*words, "--out", tmp_path / "parts")[0] == 0
    whole, parts = table(tmp_path / "whole"), table(tmp_path / "parts")
    assert timeless(whole["rows"]) == timeless(parts["rows"])
    assert {finding["id"] for finding in whole["findings"]} == {"M3", "M4", "M5"}
    assert sum(row["part"] == "enumerated" for row in whole["rows"]) == 10


def test_what_follows_a_given_beginning_is_rated_alone(make: Callable[..., LoopMDM], scorer: str) -> None:
    tokenizer = ByteTokenizer()
    model = make(0, vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id)
    prefixes = torch.randint(0, 256, (3, 5), generator=torch.Generator().manual_seed(2))
    rating = load_scorer(scorer)
    scoring = TextScoring(model, rating, 16, 8, 0, prefixes)
    tokens = scoring.draw(ComputePlan.constant(2), 0, 3).tokens
    assert torch.equal(tokens[:, :5], prefixes)
    whole, _ = rating.nll(tokens)
    begun, _ = rating.nll(prefixes)
    np.testing.assert_allclose(scoring.losses(tokens), ((whole - begun) / 11).numpy())
    again = scoring.draw(ComputePlan.constant(2), 1, 2).tokens
    assert torch.equal(again, tokens[1:])  # samples are named by their numbers, whatever the batch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "7"], "steps is 7: 8 segments need at least one step each"),
        (["--light-segments", "11"], "light must be an integer in 0..10, got 11"),
        ([], "--scorer: text samples need a scorer; give one, or --by proxy"),
        (
            ["--scorer", "SCORER", "--prefix", "16"],
            "--prefix 16 of 64 samples: expected fewer than 16 tokens",
        ),
    ],
)
def test_bad_usage(
    study: Study, folders: Any, corpus: str, scorer: str, tmp_path: Path, words: list[str], message: str
) -> None:
    given = [scorer if word == "SCORER" else word for word in words]
    status, error = study(
        "schedules", folders("a"), folders("c"), "--data", corpus, "--windows", "3", *given, "--out", tmp_path
    )
    assert status == 2 and message in error.splitlines()[-1]


def test_models_of_other_vocabularies_do_not_make_a_schedule(
    study: Study, folders: Any, tmp_path: Path
) -> None:
    status, error = study("schedules", folders("a"), folders("seven"), "--out", tmp_path)
    assert status == 2 and "models that are compared share both" in error
