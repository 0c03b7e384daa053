"""The importance study against brute force; E15; resuming; bad usage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopmdm.data.batches import Batch
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.model import diffusion
from loopmdm.study import importance
from loopmdm.study.importance import BASELINE, compare, curves, measured, table
from loopmdm.study.kit.inputs import Noisy, at_times, stratified
from loopmdm.study.kit.sources import Denoiser

from .conftest import Build, interrupted_after

Study = Callable[..., tuple[int, str]]


def batch(size: int = 3, length: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 6, (size, length), generator=generator)
    padding, prompt = torch.ones_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    padding[1, 7:] = 0
    prompt[2, :4] = True
    return Batch(tokens, padding, prompt)


def brute_force(heavy: Denoiser, light: Denoiser, noisy: Noisy, swap: bool) -> list[list[float]]:
    """|gap|, gap and KL summed over the masked tokens of each sequence, token by token."""
    logs = []
    for denoiser in (heavy, light):
        model = denoiser.model
        ids = torch.where(noisy.masked, model.config.mask_token_id, noisy.clean)
        sigma = diffusion.sigma(noisy.t) if model.config.time_conditioning else None
        keys = noisy.attention_mask if model.config.key_padding_mask else None
        logits = model(ids, sigma, num_loops=denoiser.num_loops, attention_mask=keys)
        logs.append(diffusion.subs_log_probs(logits.double(), ids, model.config.mask_token_id))
    sums = [[0.0] * len(noisy.t) for _ in range(3)]
    for i, j in noisy.masked.nonzero().tolist():
        h, other = (log[i, j, :6].detach() for log in logs)
        truth = int(noisy.clean[i, j])
        gap = float(h[truth] - other[truth])
        p, q = (other, h) if swap else (h, other)
        for m, value in enumerate((abs(gap), gap, float((p.exp() * (p - q)).sum()))):
            sums[m][i] += value
    return sums


@pytest.mark.parametrize("kl", ["heavy-light", "light-heavy"])
@pytest.mark.parametrize("fields", [{}, {"time_conditioning": True, "key_padding_mask": True}])
@torch.no_grad()
def test_sums_are_those_of_single_tokens(make: Build, kl: str, fields: dict[str, Any]) -> None:
    heavy = Denoiser("h", make(0, **fields), 3)
    light = Denoiser("l", make(1, num_layers=3, loop_end=2, **fields), 1)
    for noisy in stratified(batch(), 2, seed=4, first=1):
        (got,) = compare(heavy, [light], noisy, kl)
        expected = brute_force(heavy, light, noisy, swap=kl == "light-heavy")
        torch.testing.assert_close(
            torch.stack(got), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_e15_kl_is_not_negative_and_a_model_has_none_to_itself(make: Build) -> None:
    heavy, other = Denoiser("h", make(0), 3), Denoiser("o", make(1), 3)
    for noisy in stratified(batch(), 4, seed=0, first=0):
        same, different, fewer_loops = compare(heavy, [heavy, other, Denoiser("h@1", heavy.model, 1)], noisy)
        assert not any(part.any() for part in same)
        for pair in (different, fewer_loops):
            assert (pair.kl >= 0).all() and (pair.kl > 0)[noisy.masked.any(1)].all()


@torch.no_grad()
def test_e15_models_that_read_different_tokens_are_caught(make: Build) -> None:
    heavy, other = Denoiser("h", make(0), 1), Denoiser("o", make(1), 1)
    (noisy,) = at_times(batch(), [0.5], seed=0, first=0)
    stages = other.model.stages
    other.model.stages = lambda ids, *rest, **options: stages(ids.flip(1), *rest, **options)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="read different tokens"):
        compare(heavy, [other], noisy)


def test_rows_pool_bins_and_subtract_the_second_heavy_model() -> None:
    generator = np.random.default_rng(0)
    masked = generator.integers(1, 9, size=(5, 8)).astype(float)
    sums = generator.uniform(size=(2, 3, 5, 8)) * masked
    rows = table(*curves([BASELINE, "light"], masked, sums, 4, seed=0))
    assert [(row["pair"], row["t_low"]) for row in rows] == [
        (name, j / 4) for name in (BASELINE, "light") for j in range(4)
    ]
    for j in range(4):
        pooled = sums[..., 2 * j : 2 * j + 2].sum((-1, -2)) / masked[:, 2 * j : 2 * j + 2].sum()
        first, light = rows[j], rows[4 + j]
        assert "relative_kl" not in first
        assert light["kl"] == pytest.approx(pooled[1, 2]) and first["kl"] == pytest.approx(pooled[0, 2])
        assert light["relative_abs_gap"] == pytest.approx(pooled[1, 0] - pooled[0, 0])
        assert light["kl_low"] < light["kl"] < light["kl_high"]
        assert light["masked_tokens"] == masked[:, 2 * j : 2 * j + 2].sum()
    twins = table(*curves([BASELINE, "light"], masked, np.stack([sums[0], sums[0]]), 4, seed=0))
    assert all(
        row["relative_kl"] == row["relative_kl_low"] == row["relative_kl_high"] == 0 for row in twins[4:]
    )


@torch.no_grad()
def test_figures_do_not_depend_on_the_batch(make: Build) -> None:
    heavy, light = Denoiser("h", make(0), 3), Denoiser("l", make(1), 1)
    tokens = batch().input_ids
    whole = measured(heavy, [light], Batch(tokens), 4, 7, 0)
    parts = [measured(heavy, [light], Batch(tokens[i : i + 1]), 4, 7, i) for i in range(3)]
    assert [part["masked"][0] for part in parts] == whole["masked"]
    sums = np.concatenate([part["sums"] for part in parts], axis=-2)
    np.testing.assert_array_equal(sums, whole["sums"])


def test_an_interrupted_study_goes_on_with_the_same_table(
    folders: Callable[[str], str],
    corpus: str,
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["importance", folders("a"), folders("c"), f"{folders('a')}@1", "--second-heavy", folders("b")]
    words += ["--data", corpus, "--length", 16, "--windows", 20, "--bins", 8]
    assert study(*words, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, "importance", 5)
        assert study(*words, "--out", tmp_path / "parts")[0] == 130
        status, error = study(*words, "--out", tmp_path / "parts")
    assert status == 0 and "1 of 2 done before" in error
    documents = [json.loads((tmp_path / name / "table.json").read_text()) for name in ("whole", "parts")]
    assert (
        documents[0]["rows"] == documents[1]["rows"] and documents[0]["findings"] == documents[1]["findings"]
    )
    rows, facts = documents[0]["rows"], documents[0]["provenance"]
    assert len(rows) == 3 * (8 + 4) and facts["network_calls"] == 20 * 8 * 4
    assert {finding["id"] for finding in documents[0]["findings"]} == {"M2", "M2, pooled"}
    assert facts["models"][folders("a")]["precision"] == "float32" and facts["kl"] == "KL(heavy || light)"
    assert (tmp_path / "whole" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "models, options, message",
    [
        (["a"], [], "LIGHT"),
        (["a", "seven"], [], "share both"),
        (["a", "b@0"], [], "S >= 1"),
        (["a", "b"], ["--bins", "6"], "multiple of 4"),
        (["a", "b"], ["--kl", "both"], "invalid choice"),
        (["board", "board@1"], [], "--data"),
    ],
)
def test_bad_usage(
    folders: Callable[[str], str],
    corpus: str,
    study: Study,
    tmp_path: Path,
    models: list[str],
    options: list[str],
    message: str,
) -> None:
    words = ["importance", *map(folders, models), "--data", corpus, "--out", tmp_path, *options]
    status, error = study(*words)
    assert status == 2 and message in error and error.count("\n") == 1


def test_a_changed_model_is_refused(
    folders: Callable[[str], str], corpus: str, study: Study, tmp_path: Path, make: Build
) -> None:
    model, byte = tmp_path / "model", {"vocab_size": ByteTokenizer().vocab_size}
    byte["mask_token_id"] = ByteTokenizer().mask_token_id
    words = ["importance", model, folders("b"), "--tokenizer", "byte", "--data", corpus, "--length", 16]
    words += ["--windows", 2, "--bins", 4, "--out", tmp_path / "out"]
    make(0, **byte).save_pretrained(model)
    assert study(*words)[0] == 0
    make(9, **byte).save_pretrained(model)
    status, error = study(*words)
    assert status == 2 and "was begun with other weights" in error


def test_m2_says_where_the_peaks_are(tmp_path: Path) -> None:
    from loopmdm.study.kit.folder import StudyFolder

    masked = np.full((4, 8), 10.0)
    shape = np.array([0, 1, 2, 5, 4, 3, 1, 0.0])
    folder = StudyFolder(tmp_path, "importance", {}, progress=False)
    for curve in (shape, np.arange(8.0)):
        sums = np.broadcast_to(curve, (1, 3, 4, 8)) * 10
        for bins in (8, 4):
            _, found = curves(["light"], masked, sums, bins, seed=0)
            importance._conclude(folder, "light", found["light"], bins, False)
    assert [finding["id"] for finding in folder.findings] == ["M2", "M2, pooled"] * 2
    assert [finding["holds"] for finding in folder.findings] == [True, True, False, False]
    assert "abs_gap 5.0000 nats at t = 0.44 (inside in 100 %" in folder.findings[0]["outcome"]
    assert "kl 3.5000 nats at t = 0.38" in folder.findings[1]["outcome"]
