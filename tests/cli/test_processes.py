"""Training in processes of its own: stopped by signals, killed, on two ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loopmdm.train import read_metrics

from .conftest import TINY, Call

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
LONG = [*TINY, "--steps", "100000", "--schedule", "constant", "--log-every", "1", "--eval-every", "0"]


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loopmdm", *map(str, words)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_run_continues_exactly(
    call: Call, tmp_path: Path, corpus: Path, number: int, status: int
) -> None:
    out = tmp_path / "run"
    process = start("train", "--data", corpus, "--out", out, *LONG, "--checkpoint-every", 2)
    wait_for(process, "step 5/")
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == status and printed == "" and "Traceback" not in errors
    if number != signal.SIGKILL:
        assert f"continue with: loopmdm train --resume --out {out}" in errors
    steps = len(losses(out)) + 3
    assert call("train", "--resume", "--out", out, "--steps", steps).status == 0
    whole = tmp_path / "whole"
    assert call("train", "--data", corpus, "--out", whole, *LONG, "--steps", steps).status == 0
    assert losses(out) == losses(whole) and len(losses(out)) == steps


def test_two_ranks(tmp_path: Path, corpus: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common: dict[str, Any] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    words = ["train", "--data", corpus, "--out", tmp_path / "run", *TINY, "--tokenizer", "bpe:270", "--json"]
    ranks = [start(*words, "--steps", 2, "--log-every", 1, RANK=str(rank), **common) for rank in range(2)]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert '"steps": 2' in outputs[0][0] and outputs[1][0] == ""
    assert [r["tokens"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r] == [
        256,
        512,
    ]
