"""`loopmdm study` around a study: settings, files, errors."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import loopmdm.cli.study
from loopmdm.cli import main
from loopmdm.model import LoopMDM
from loopmdm.model.config import LoopMDMConfig
from loopmdm.runs.options import UsageError
from loopmdm.runs.provenance import describe_model, weights_fingerprint
from loopmdm.study.kit.folder import StudyFolder


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A study named `count`: squares of 0..N-1."""
    module = ModuleType("loopmdm.study.count", "Squares.")
    drawn: list[str] = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--num", type=int, default=3)

    def run(args: argparse.Namespace, folder: StudyFolder) -> list[dict[str, Any]]:
        assert torch.is_inference_mode_enabled()
        if args.num < 1:
            raise UsageError("--num: nothing to count")

        def square(key: str) -> int:
            drawn.append(key)
            return int(key) ** 2

        values = folder.items(map(str, range(args.num)), square, "squares")
        folder.facts["network_calls"] = 0
        folder.find("C1", "squares grow", f"up to {values[-1]}", True)
        return [{"number": i, "square": value} for i, value in enumerate(values)]

    vars(module).update(
        SUMMARY="count",
        EPILOG="example",
        add_arguments=add_arguments,
        run=run,
        draw=lambda rows: Figure(),
        drawn=drawn,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(loopmdm.cli.study, "STUDIES", {"count": module.__name__})
    return module


def test_a_study_runs_once_and_is_written_whole(
    count: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", "count", "--num", "4", "--out", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "C1 holds: squares grow\n    up to 9" in shown.out and "figure.png" in shown.err
    first = (tmp_path / "table.json").read_bytes()
    assert main([*words, "--json", "--threads", "1"]) == 0  # the same figures, whatever the machine's options
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(first) and (tmp_path / "table.json").read_bytes() == first
    assert count.drawn == ["0", "1", "2", "3"]
    assert document["rows"][3] == {"number": 3, "square": 9}
    facts = document["provenance"]
    assert set(facts) == {"command", "date", "versions", "machine", "network_calls"}
    assert facts["versions"]["torch"] == torch.__version__ and facts["machine"]["processor"]


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["count"], 2, "--out"),
        (["fly", "--out", "x"], 2, "invalid choice: 'fly'"),
        ([], 2, "NAME"),
        (["count", "--out", "{}", "--num", "0"], 2, "nothing to count"),
        (["count", "--out", "{}/file"], 1, "exists"),
    ],
)
def test_bad_usage(
    count: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    message: str,
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["study", *(word.format(tmp_path) for word in words)]) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_other_options_in_the_same_folder(
    count: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "count", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["study", "count", "--num", "5", "--out", str(tmp_path)]) == 2
    assert "num was 3, is 5" in capsys.readouterr().err


def test_the_fingerprint_is_of_the_weights() -> None:
    torch.manual_seed(0)
    model = LoopMDM(LoopMDMConfig(vocab_size=5, mask_token_id=4, hidden_size=8, num_heads=2, num_layers=3))
    before = weights_fingerprint(model)
    described = describe_model("here", model)
    assert described["weights"] == before and described["precision"] == "float32"
    assert described["parameters"] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model.blocks[1].attn_out.weight[0, 0] += 1e-3  # type: ignore[union-attr, index]
    assert weights_fingerprint(model) != before
