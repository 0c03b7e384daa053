"""The examples run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_on_text(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("train_on_text").main(str(corpus), str(tmp_path / "run"), steps=2)
    out = capsys.readouterr().out
    assert out.startswith("S = 1: ") and "A sample at S = 4:\n" in out
    assert (tmp_path / "run" / "loopmdm_tokenizer.json").exists()


def test_solve_puzzles(sudoku_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("solve_puzzles").main(str(sudoku_run), num=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("left_to_right, S = 1: ") and lines[3].startswith("   confidence, S = 6: ")
    digits = [line for line in lines if line.startswith("row ")]
    assert 18 <= len(digits) <= 24 and lines[-1] == "+-------+-------+"
