"""The examples run."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from loopmdm import LoopMDM
from loopmdm.train import read_metrics

from .conftest import STEPS, TINY

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


SRUN = """#!/bin/sh
shift  # --kill-on-bad-exit
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" > "$LOGS/$node" 2>&1 & pids="$pids $!"; done
for pid in $pids; do wait "$pid" || status=$?; done
exit "${status:-0}"
"""


def test_two_nodes_under_slurm(tmp_path: Path, corpus: Path) -> None:
    """With stand-ins for srun and scontrol, and both nodes on this machine."""
    tools = {"srun": SRUN, "scontrol": "#!/bin/sh\nprintf '127.0.0.1\\n127.0.0.2\\n'\n"}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binaries = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "PATH": binaries,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "LOGS": str(tmp_path),
        "PORT": str(port),
        "PROCESSES": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "OMP_NUM_THREADS": "1",
    }
    run = tmp_path / "run"
    command = ["bash", EXAMPLES / "train_two_nodes.slurm", "--data", corpus, *TINY, *STEPS, "--out", run]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    said = "".join((tmp_path / node).read_text() for node in "12")
    assert done.returncode == 0, said
    assert len(read_metrics(run / "metrics.jsonl")) == 6 and said.count("The model is in") == 1
    assert LoopMDM.from_pretrained(run).config.hidden_size == 16
