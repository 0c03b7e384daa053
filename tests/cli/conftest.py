"""Tiny runs of the command line, made once, and a way to call it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from loopmdm.cli import main
from loopmdm.model import LoopMDM
from loopmdm.model.config import LoopMDMConfig

TINY = [
    "--hidden",
    "16",
    "--heads",
    "2",
    "--layers",
    "3",
    "--loop",
    "1:2",
    "--max-loops",
    "2",
    "--length",
    "32",
    "--batch-size",
    "4",
    "--eval-size",
    "2",
]
SCORER = [*TINY[:4], "--layers", "2", *TINY[10:], "--log-every", "1", "--eval-every", "0"]
STEPS = ["--steps", "4", "--log-every", "1", "--eval-every", "2"]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document


Call = Callable[..., Outcome]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line given as words; returns exit status, standard output and standard error."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        status = main([str(word) for word in words])
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(30):
        (folder / f"{index:02}.txt").write_text(
            f"Text number {index} counts: " + " ".join(map(str, range(index + 20)))
        )
    return folder


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "text"
    assert main(["train", "--data", str(corpus), "--out", str(folder), *TINY, *STEPS]) == 0
    return folder


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A tiny autoregressive model of the corpus."""
    folder = tmp_path_factory.mktemp("runs") / "scorer"
    words = ["--autoregressive", "--data", str(corpus), "--out", str(folder), "--steps", "30", "--lr", "0.01"]
    assert main(["train", *words, *SCORER, "--warmup", "5", "--ema", "0.5"]) == 0
    return folder


@pytest.fixture(scope="session")
def sudoku_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sudoku6"
    small = [
        "--hidden",
        "16",
        "--heads",
        "2",
        "--steps",
        "3",
        "--batch-size",
        "8",
        "--eval-size",
        "2",
        "--log-every",
        "1",
    ]
    assert main(["train", "--preset", "sudoku6", "--out", str(folder), *small]) == 0
    return folder


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Stands for the shipped checkpoints: small models with random weights."""
    folder = tmp_path_factory.mktemp("shipped")
    for name, preset in (("sudoku9", "sudoku"), ("sudoku6", "sudoku6")):
        torch.manual_seed(0)
        model = LoopMDM(LoopMDMConfig.preset(preset, hidden_size=16, num_heads=2, max_loops=2))
        with torch.no_grad():
            model.output_layer.linear.weight.normal_()
        model.save_pretrained(folder / name)
    return lambda name: folder / name
