"""The scaling study: one pass for all loop counts equals separate ones; gain, change, time fit, samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from loopmdm import LoopMDM, sample
from loopmdm.data.batches import Batch
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.quality import generative_perplexity, load_scorer, unigram_entropy
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.quality.likelihood import evaluate_nll, nll_by_time_bin
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.kit.inputs import stratified
from loopmdm.study.scaling.study import default_loops, measured, over_loops, tables
from loopmdm.study.scaling.time import Line, rows_of_time

from .conftest import Build, interrupted_after

Study = Callable[..., tuple[int, str]]
LOOPS = [1, 2, 5]


def batches() -> list[Batch]:
    tokens = torch.randint(0, 6, (5, 12), generator=torch.Generator().manual_seed(0))
    padding, prompt = torch.ones_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    padding[1, 9:] = 0
    prompt[3, :5] = True
    return [Batch(tokens[:3], padding[:3], prompt[:3]), Batch(tokens[3:], padding[3:], prompt[3:])]


@pytest.mark.parametrize("fields", [{}, {"time_conditioning": True, "key_padding_mask": True}])
@torch.no_grad()
def test_nll_and_gain_are_those_of_separate_evaluations(make: Build, fields: dict[str, Any]) -> None:
    model = make(0, **fields)
    parts = [
        measured(model, batch, LOOPS, 4, 9, first) for batch, first in zip(batches(), (0, 3), strict=True)
    ]
    rows = tables(parts, LOOPS, 2, seed=0)
    expected = evaluate_nll(model, batches(), num_loops=LOOPS, num_t=4, seed=9)
    nll = [row for row in rows if row["part"] == "nll"]
    assert [row["num_loops"] for row in nll] == LOOPS
    for row, result in zip(nll, expected, strict=True):
        assert row["nll"] == pytest.approx(result.nll, rel=1e-6)
        assert row["nll_low"] < row["nll"] < row["nll_high"]
        assert row["nll_less_S2"] == pytest.approx(result.nll - expected[1].nll, abs=1e-6)
    first, *others = nll_by_time_bin(model, batches(), num_loops=LOOPS, num_bins=4, seed=9)
    for loops, bins in zip(LOOPS[1:], others, strict=True):
        gains = [row for row in rows if row["part"] == "gain" and row["num_loops"] == loops]
        for row, before, after in zip(gains, first, bins, strict=True):
            assert row["gain"] == pytest.approx(before.cross_entropy - after.cross_entropy, abs=1e-5)


@torch.no_grad()
def test_l7_change_is_of_the_states(make: Build) -> None:
    model = make(1)
    noisy = stratified(batches()[0], 2, seed=0, first=0)[1]
    _, changes = over_loops(model, noisy, [4])
    stages = noisy.stages(model)
    states = [stages.before()]
    for _ in range(4):
        states.append(stages.loop(states[-1], 1))
    for k in range(1, 5):
        for i in range(3):
            now, before = states[k][i].double(), states[k - 1][i].double()
            expected = float(((now - before) ** 2).sum().sqrt() / (now**2).sum().sqrt())
            assert float(changes[k - 1, i]) == pytest.approx(expected, rel=1e-6)
    parts = [measured(model, batches()[0], [1, 2, 4], 2, 0, 0)]
    rows = [row for row in tables(parts, [1, 2, 4], 4, seed=0) if row["part"] == "change"]
    assert [row["k"] for row in rows] == [1, 2, 3, 4]
    by_time = torch.tensor(parts[0]["change"], dtype=torch.float64).mean(1)
    for row, values in zip(rows, by_time, strict=True):
        assert row["r"] == pytest.approx(float(values.mean()))
        assert row["variance_over_t"] == pytest.approx(float(values.var(correction=0)), rel=1e-6)
        assert row["k_times_r"] == pytest.approx(row["k"] * row["r"])


def test_line_is_the_least_squares_line() -> None:
    exact = Line.fit([1, 2, 4], [3.5, 5.5, 9.5])
    assert exact == pytest.approx((1.5, 2.0, 1.0))
    noisy = Line.fit([1, 2, 3], [1.0, 3.0, 2.0])
    assert noisy == pytest.approx((1.0, 0.5, 0.25))


def test_default_loops_hold_the_largest_of_training_and_twice_that() -> None:
    assert default_loops(4) == [1, 2, 3, 4, 6, 8]
    assert default_loops(5) == [1, 2, 3, 4, 5, 6, 8, 10]
    assert default_loops(12) == [1, 2, 3, 4, 6, 8, 12, 16, 24]


@torch.no_grad()
def test_timing_has_every_loop_count_in_every_round(make: Build, tmp_path: Path) -> None:
    model, folder = make(0), StudyFolder(tmp_path, "scaling", {}, progress=False)
    rows = rows_of_time(folder, model, batches()[0].input_ids, [1, 2, 4], 2)
    taken = folder.items(["round 0", "round 1"], lambda key: pytest.fail(key))
    assert all(len(one) == 4 for one in taken)
    times = [row for row in rows if row["part"] == "time"]
    assert [row["seconds"] for row in times] == [min(column) for column in zip(*taken, strict=True)][:3]
    assert folder.findings[0]["id"] == "L5" and folder.facts["timed_batch"] == [3, 12]


def test_study_of_text(
    folders: Callable[[str], str], corpus: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["scaling", folders("a"), "--data", corpus, "--length", 16, "--windows", 20, "--bins", 4]
    words += ["--loops", "1,2,3", "--samples", 3, "--steps", "2,4", "--rounds", 1, "--out"]
    with monkeypatch.context() as patch:
        interrupted_after(patch, "scaling", 6)
        assert study(*words, tmp_path / "parts")[0] == 130
        assert study(*words, tmp_path / "parts")[0] == 0
    assert study(*words, tmp_path / "whole")[0] == 0
    parts, whole = (json.loads((tmp_path / name / "table.json").read_text()) for name in ("parts", "whole"))
    kept = [
        [row for row in document["rows"] if "time" not in row["part"]] for document in (parts, whole)
    ]  # the clock alone differs
    assert kept[0] == kept[1]
    assert [finding["id"] for finding in whole["findings"]] == ["L1", "L9", "L7", "L5"]
    samples = [row for row in whole["rows"] if row["part"] == "samples"]
    assert [(row["steps"], row["num_loops"]) for row in samples] == [
        (t, s) for t in (2, 4) for s in (1, 2, 3)
    ]
    for row in samples:
        assert row["loops_run"] == row["num_loops"] * row["network_calls"]
        assert row["network_calls"] <= 3 * row["steps"] and row["entropy_low"] <= row["entropy_high"]
        assert row["flops (blocks)"] < row["flops (blocks+head)"]


def test_study_of_boards(folders: Callable[[str], str], study: Study, tmp_path: Path) -> None:
    words = ["scaling", folders("board"), "--windows", 3, "--boards", 2, "--bins", 2, "--loops", "1,2,3"]
    assert study(*words, "--rounds", 1, "--out", tmp_path)[0] == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    boards = [row for row in rows if row["part"] == "boards"]
    assert [(row["order"], row["num_loops"]) for row in boards] == [
        (order, s) for order in ("left_to_right", "confidence") for s in (1, 2, 3)
    ]
    assert all(row["solved"] in (0.0, 0.5, 1.0) and row["network_calls"] > 36 for row in boards)


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("a", ["--loops", "2,3,4"], "expected 1"),
        ("a", ["--loops", "1,2"], "at least two more"),
        ("board", ["--data", "x"], "--data"),
        ("board", ["--scorer", "x"], "--scorer"),
    ],
)
def test_bad_usage(
    folders: Callable[[str], str], study: Study, tmp_path: Path, model: str, options: list[str], message: str
) -> None:
    status, error = study("scaling", folders(model), *options, "--out", tmp_path)
    assert status == 2 and message in error and error.count("\n") == 1


def test_samples_are_scored(
    folders: Callable[[str], str], study: Study, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopmdm.study.scaling.study.draw", lambda rows: Figure())
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "max_length": 16}
    scorer = CausalLM(CausalConfig(tokenizer.vocab_size, tokenizer.mask_token_id, **sizes))
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    scorer.save_pretrained(tmp_path / "scorer")
    words = ["scaling", folders("a"), "--data", corpus, "--length", 16, "--windows", 2, "--bins", 2]
    words += ["--loops", "1,2,3", "--samples", 4, "--steps", "3", "--rounds", 1, "--seed", 5]
    assert study(*words, "--scorer", tmp_path / "scorer", "--out", tmp_path / "out")[0] == 0
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    assert document["provenance"]["scorer"] == str(tmp_path / "scorer")
    (row,) = (row for row in document["rows"] if row["part"] == "samples" and row["num_loops"] == 2)
    model = LoopMDM.from_pretrained(folders("a"))
    tokens = sample(model, 4, 16, steps=3, plan=2, seed=5, progress=False).tokens
    expected = generative_perplexity(load_scorer(tmp_path / "scorer", tokenizer), tokens)
    assert row["perplexity"] == pytest.approx(expected.value)
    assert row["perplexity_low"] < row["perplexity"] < row["perplexity_high"]
    assert row["entropy"] == pytest.approx(float(unigram_entropy(tokens).mean()))
