"""`loopmdm train --autoregressive`: trained, resumed and evaluated as other runs, and never sampled from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loopmdm.data.text import read_documents, split_documents
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.quality.causal import CausalLM
from loopmdm.quality.likelihood import evaluate_autoregressive
from loopmdm.train import read_metrics

from .conftest import SCORER, Call


def test_a_scorer_is_trained_and_evaluated(scorer: Path, corpus: Path) -> None:
    model = CausalLM.from_pretrained(scorer)
    assert (model.config.hidden_size, model.config.num_layers, model.config.max_length) == (16, 2, 32)
    assert json.loads((scorer / "run.json").read_text())["autoregressive"] is True
    records = read_metrics(scorer / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < losses[0] - 1
    _, held_out = split_documents(read_documents(corpus), 0.05)
    stream = [i for text in held_out for i in (*ByteTokenizer().encode(text).tolist(), 256)]
    rows = [[256, *stream[at : at + 30], 256] for at in range(0, len(stream) - 29, 30)]
    tokens = torch.tensor([rows[0], rows[-1]])
    expected = evaluate_autoregressive(
        model, [tokens], bytes_per_token=int((tokens < 256).sum()) / tokens.numel()
    )
    (result,) = records[-1]["evaluation"]["held_out"]
    assert result["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)


def test_resumed_run_is_the_uninterrupted_one(call: Call, tmp_path: Path, corpus: Path) -> None:
    words = ["train", "--autoregressive", "--data", corpus, *SCORER, "--schedule", "constant"]
    half, whole = tmp_path / "half", tmp_path / "whole"
    assert call(*words, "--steps", 2, "--out", half).status == 0
    assert call("train", "--resume", "--out", half, "--steps", 4).status == 0
    done = call(*words, "--steps", 4, "--out", whole)
    assert done.status == 0 and f"loopmdm eval RUN --samples 64 --scorer {whole}" in done.out
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (half, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_what_does_not_go_together(call: Call, tmp_path: Path, corpus: Path, scorer: Path) -> None:
    base = ["train", "--autoregressive", "--out", tmp_path / "run"]
    for words, message in (
        (["--data", corpus, "--max-loops", 2], "without loops, dropout and samples; leave out --max-loops"),
        (["--data", corpus, "--loop", "0:1", "--dropout", 0.1], "leave out --loop, --dropout"),
        (["--preset", "sudoku6"], "--preset sudoku6 makes its own data and does not take --autoregressive"),
        ([], "nothing to train on"),
    ):
        done = call(*base, *words)
        assert done.status == 2 and message in done.err and not (tmp_path / "run").exists()
    for command in ("sample", "eval"):
        done = call(command, scorer)
        assert done.status == 1 and "this is an autoregressive scorer" in done.err
