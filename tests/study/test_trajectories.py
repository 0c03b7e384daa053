"""Trajectories against separate runs (L15) and against logits; what is shown; bad usage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import loopmdm_kernels as lk
from loopmdm.data.batches import Batch
from loopmdm.model import diffusion
from loopmdm.study.kit.inputs import at_times
from loopmdm.study.trajectories.study import KINDS, trajectories

from .conftest import Build, interrupted_after

Study = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("fields", [{}, {"time_conditioning": True, "key_padding_mask": True}])
@torch.no_grad()
def test_l15_equal_to_separate_runs(make: Build, backend: str, fields: dict[str, Any]) -> None:
    model = make(3, **fields)
    tokens = torch.randint(0, 6, (3, 11), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(tokens)
    padding[2, 8:] = 0
    (noisy,) = at_times(Batch(tokens, padding), [0.6], seed=0, first=0)
    ids = torch.where(noisy.masked, 6, tokens)
    with lk.use_backend(backend):
        followed = trajectories(model, noisy, 5)
        for k in range(1, 6):
            logits = model(ids, noisy.sigma(model), num_loops=k, attention_mask=noisy.keys(model))
            log_probs = diffusion.subs_log_probs(logits.double(), ids, 6)
            for i, (predicted, nll) in enumerate(followed):
                masked = noisy.masked[i]
                truth = tokens[i, masked][:, None]
                torch.testing.assert_close(
                    nll[k - 1], -log_probs[i, masked].gather(1, truth)[:, 0], rtol=0, atol=0
                )
                assert torch.equal(predicted[k - 1], log_probs[i, masked].argmax(-1))


def rows_of(path: Path, part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((path / "table.json").read_text())["rows"]
    return [row for row in rows if row["part"] == part]


def test_study_of_text(
    folders: Callable[[str], str], corpus: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["trajectories", folders("a"), "--data", corpus, "--length", 16, "--windows", 20, "--loops", 4]
    words += ["--sequence", 17, "--show", 3, "--t", 0.7, "--out"]
    with monkeypatch.context() as patch:
        interrupted_after(patch, "trajectories", 3)
        assert study(*words, tmp_path / "parts")[0] == 130
        assert study(*words, tmp_path / "parts")[0] == 0
    assert study(*words, tmp_path / "whole")[0] == 0
    parts, whole = (json.loads((tmp_path / name / "table.json").read_text()) for name in ("parts", "whole"))
    assert parts["rows"] == whole["rows"]
    assert whole["findings"][0]["id"] == "L15" and whole["findings"][0]["holds"] is True
    tokens = rows_of(tmp_path / "whole", "tokens")
    assert len(tokens) == 3 * 4 and len({row["position"] for row in tokens}) == 3
    for row in tokens:
        assert row["right"] == (row["prediction"] == row["truth"])
        assert len(row["before"].replace("⟨eos⟩", "∎")) == min(9, row["position"])
    kinds = rows_of(tmp_path / "whole", "kinds")
    assert [row["kind"] for row in kinds] == list(KINDS)
    assert sum(row["share"] for row in kinds) == pytest.approx(1)
    summary = rows_of(tmp_path / "whole", "all tokens")
    right = {row["kind"]: row["share"] for row in kinds}
    assert summary[0]["right"] == pytest.approx(right["stays right"] + right["becomes wrong"])
    assert summary[-1]["right"] == pytest.approx(right["stays right"] + right["becomes right"])
    assert summary[-1]["nll_since_1"] == pytest.approx(summary[-1]["nll"] - summary[0]["nll"])
    assert summary[0]["nll_since_1"] == summary[0]["nll_since_1_high"] == 0


def test_the_shown_tokens_change_most(
    folders: Callable[[str], str], corpus: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopmdm.study.trajectories.study.draw", lambda rows: Figure())
    words = ["trajectories", folders("a"), "--data", corpus, "--length", 16, "--windows", 2, "--loops", 3]
    assert study(*words, "--show", 16, "--out", tmp_path / "all")[0] == 0
    assert study(*words, "--show", 2, "--out", tmp_path / "two")[0] == 0
    every = rows_of(tmp_path / "all", "tokens")
    change = {
        position: max(values) - min(values)
        for position in {row["position"] for row in every}
        for values in [[row["nll"] for row in every if row["position"] == position]]
    }
    shown = {row["position"] for row in rows_of(tmp_path / "two", "tokens")}
    assert shown == set(sorted(change, key=lambda p: -change[p])[:2])
    chosen = sorted(change)[1]
    assert study(*words, "--positions", chosen, "--out", tmp_path / "one")[0] == 0
    assert [row["position"] for row in rows_of(tmp_path / "one", "tokens")] == [chosen] * 3


def test_study_of_boards(folders: Callable[[str], str], study: Study, tmp_path: Path) -> None:
    assert study("trajectories", folders("board"), "--windows", 2, "--out", tmp_path)[0] == 0
    cells, clues = rows_of(tmp_path, "cells"), rows_of(tmp_path, "clues")
    positions = {row["position"] for row in cells}
    assert len(positions) + len(clues) == 36 and not positions & {row["position"] for row in clues}
    assert {row["k"] for row in cells} == set(range(1, 7)) and {row["truth"] for row in cells} <= set(
        "123456"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sequence", "9"], "there are 2"),
        (["--t", "0.3,0.5"], "one time"),
        (["--t", "1.5"], "each in (0, 1]"),
        (["--positions", "99"], "are not masked"),
        (["--positions", "x"], "at least 0"),
        (["--positions", "1", "--show", "3"], "not allowed with"),
    ],
)
def test_bad_usage(
    folders: Callable[[str], str], corpus: str, study: Study, tmp_path: Path, options: list[str], message: str
) -> None:
    words = ["trajectories", folders("a"), "--data", corpus, "--length", 16, "--windows", 2, "--loops", 1]
    status, error = study(*words, *options, "--out", tmp_path)
    assert status == 2 and message in error
