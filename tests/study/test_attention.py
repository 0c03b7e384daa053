"""Mask-to-mask attention against a brute-force count, and its study."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.data.batches import Batch
from loopmdm.model import LoopMDM
from loopmdm.study.attention import apply_block, attention_probabilities, mask_to_mask
from loopmdm.study.kit.inputs import Noisy, at_times

from .conftest import Build, interrupted_after

Study = Callable[..., tuple[int, str]]
FIELDS: list[dict[str, Any]] = [
    {},
    {"positions": "learned"},
    {"time_conditioning": True, "key_padding_mask": True},
]


def noisy_batch(t: float = 0.6) -> Noisy:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 6, (3, 9), generator=generator)
    padding = torch.ones_like(tokens)
    padding[0, 7:] = 0
    return at_times(Batch(tokens, padding), [t], seed=2, first=0)[0]


def scores_of(model: LoopMDM, index: int, x: Tensor, noisy: Noisy, sequence: int, head: int) -> Tensor:
    """Attention [L, L] of one sequence and head in float64, from one pair of positions at a time."""
    block: Any = model.blocks[index]
    size = model.config.head_dim
    sigma = noisy.sigma(model)
    condition = model.condition(sigma).double()
    modulation = block.adaLN_modulation.weight.double() @ condition[sequence if len(condition) > 1 else 0]
    shift, scale = (modulation + block.adaLN_modulation.bias.double()).view(6, -1)[:2]
    rows = x[sequence].double()
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    rows = rows * block.norm1.weight.double() * (1 + scale) + shift
    q, k, _ = (rows @ block.attn_qkv.weight.double().T).view(len(rows), 3, -1, size).unbind(1)
    attended = noisy.keys(model)
    result = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i in range(len(rows)):
        for j in range(len(rows)):
            if attended is not None and not attended[sequence, j]:
                continue
            score = 0.0
            for pair in range(size // 2):
                a, b = (torch.complex(v[head, pair], v[head, pair + size // 2]) for v in (q[i], k[j]))
                if model.config.positions == "rotary":
                    angle = (i - j) / 10_000 ** (2 * pair / size)
                    a = a * complex(math.cos(angle), math.sin(angle))
                score += float((a * b.conj()).real)
            result[i, j] = math.exp(score / math.sqrt(size))
    return result / result.sum(-1, keepdim=True)


@pytest.mark.parametrize("fields", FIELDS)
@torch.no_grad()
def test_probabilities_are_those_of_single_pairs(make: Build, fields: dict[str, Any]) -> None:
    model, noisy = make(0, **fields), noisy_batch()
    x = noisy.stages(model).before()
    got = attention_probabilities(model, 1, x, noisy)
    for sequence, head in ((0, 1), (2, 0)):
        expected = scores_of(model, 1, x, noisy, sequence, head)
        torch.testing.assert_close(got[sequence, head].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", FIELDS)
@torch.no_grad()
def test_mass_is_counted_at_the_states_of_the_loop(make: Build, fields: dict[str, Any]) -> None:
    model, noisy = make(0, **fields), noisy_batch()
    mass = mask_to_mask(model, noisy, [1, 3])
    assert mass.shape == (2, 2, 3)
    stages = noisy.stages(model)
    for row, loops in enumerate((1, 3)):
        x = stages.before() if loops == 1 else stages.loop(stages.before(), loops - 1)
        for layer, index in enumerate((1, 2)):
            probabilities = attention_probabilities(model, index, x, noisy)
            for sequence in range(3):
                chosen = noisy.masked[sequence].nonzero().flatten().tolist()
                expected = sum(
                    float(probabilities[sequence, head, i, j]) / 2
                    for head in range(2)
                    for i in chosen
                    for j in chosen
                )
                assert float(mass[row, layer, sequence]) == pytest.approx(expected, rel=1e-5)
            x = apply_block(model, index, x, noisy)
        torch.testing.assert_close(x, stages.loop(stages.before(), loops))  # the blocks are the loop


@torch.no_grad()
def test_without_preference_the_mass_is_the_share_of_masks(make: Build) -> None:
    model, noisy = make(0), noisy_batch()
    for block in model.blocks:
        block.attn_qkv.weight.zero_()  # type: ignore[union-attr, operator]
    count = noisy.masked.sum(1).double()
    torch.testing.assert_close(mask_to_mask(model, noisy, [2])[0, 0], count * count / 9)


def test_times_nest_and_keep_prompt_and_padding(make: Build) -> None:
    tokens = torch.zeros(2, 40, dtype=torch.int64)
    prompt = torch.arange(40).expand(2, 40) < 4
    padding = (torch.arange(40) < 30).expand(2, 40)
    early, late, all_masked = at_times(Batch(tokens, padding, prompt), [0.2, 0.7, 1.0], seed=0, first=0)
    assert (early.masked <= late.masked).all() and (late.masked <= all_masked.masked).all()
    assert 0 < early.masked.sum() < late.masked.sum() < all_masked.masked.sum() == 2 * 26
    (alone,) = at_times(Batch(tokens[1:], padding[1:], prompt[1:]), [0.7], seed=0, first=1)
    assert torch.equal(alone.masked[0], late.masked[1])


def test_study_of_text(
    folders: Callable[[str], str], corpus: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["attention", folders("a"), "--naive", folders("plain"), "--data", corpus, "--length", 16]
    words += ["--windows", 20, "--loops", "1,2,4", "--times", "0.5", "--out"]
    with monkeypatch.context() as patch:
        interrupted_after(patch, "attention", 4)
        assert study(*words, tmp_path / "parts")[0] == 130
        assert study(*words, tmp_path / "parts")[0] == 0
    assert study(*words, tmp_path / "whole")[0] == 0
    parts, whole = (json.loads((tmp_path / name / "table.json").read_text()) for name in ("parts", "whole"))
    assert parts["rows"] == whole["rows"] and len(whole["rows"]) == 2 * 3 * 2
    for row in whole["rows"]:
        assert 0 < row["mass_low"] <= row["mass"] <= row["mass_high"] < 1
        (once,) = (
            other["mass"]
            for other in whole["rows"]
            if other["num_loops"] == 1 and (other["model"], other["layer"]) == (row["model"], row["layer"])
        )
        assert row["rise"] == pytest.approx(row["mass"] / once - 1)
        assert row["lift"] == pytest.approx(row["mass"] / row["masked_share"], rel=0.2)
    assert [row["trained_with_loop"] for row in whole["rows"]] == [True] * 6 + [False] * 6
    assert [finding["id"] for finding in whole["findings"]] == [
        "L8",
        "L8, layer 2",
        "L8",
        "L8",
    ]


def test_study_of_boards(folders: Callable[[str], str], study: Study, tmp_path: Path) -> None:
    words = ["attention", folders("board"), "--windows", 3, "--times", "1", "--loops", "1,3,6"]
    assert study(*words, "--out", tmp_path)[0] == 0
    document = json.loads((tmp_path / "table.json").read_text())
    assert {row["layer"] for row in document["rows"]} == {1}
    assert [f["id"] for f in document["findings"]] == ["L8", "L8 (soft)"]


def test_whole_boards_are_masked_anywhere(
    folders: Callable[[str], str], study: Study, tmp_path: Path
) -> None:
    words = [
        "attention",
        folders("board"),
        "--windows",
        20,
        "--times",
        "0.5,1",
        "--loops",
        "1",
        "--whole-boards",
    ]
    assert study(*words, "--out", tmp_path)[0] == 0
    document = json.loads((tmp_path / "table.json").read_text())
    shares = {row["t"]: row["masked_share"] for row in document["rows"]}
    assert shares[1] == 1 and shares[0.5] == pytest.approx(0.5, abs=0.06)
    assert "solved boards made here" in document["provenance"]["data"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--whole-boards"], "is a model of text"),
        (["--times", "0"], "each in (0, 1]"),
        (["--loops", "0"], "at least 1"),
        (["--naive", "seven"], "share both"),
    ],
)
def test_bad_usage(
    folders: Callable[[str], str], corpus: str, study: Study, tmp_path: Path, options: list[str], message: str
) -> None:
    words = [folders(word) if word == "seven" else word for word in options]
    status, error = study("attention", folders("a"), "--data", corpus, *words, "--out", tmp_path)
    assert status == 2 and message in error and error.count("\n") == 1
