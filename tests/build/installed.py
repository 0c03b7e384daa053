"""Tries the package that is installed, and nothing of the source tree: self-test, training, samples.

python -I tests/build/installed.py
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import loopmdm
import loopmdm_kernels as lk
from loopmdm_kernels.backends import recorded

ROOT = Path(__file__).resolve().parents[2]
LOOPMDM = Path(sys.executable).parent / "loopmdm"


def check_place() -> None:
    for package in (loopmdm, lk):
        folder = Path(package.__file__ or "").resolve().parent
        if folder.is_relative_to(ROOT):
            sys.exit(f"{package.__name__} is that of the source tree, {folder}")


def command(*arguments: str | Path) -> str:
    """What the installed command prints."""
    done = subprocess.run([LOOPMDM, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"loopmdm {' '.join(map(str, arguments))}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_step() -> None:
    """A step of an optimiser lowers the loss of its batch, and the kernels did the work."""
    torch.manual_seed(0)
    model = loopmdm.LoopMDM(loopmdm.LoopMDMConfig.preset("sudoku6"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(8 * 36).reshape(8, 36) % 6
    losses = []
    with recorded() as used:
        for _ in range(2):
            loss = model.loss(tokens, num_loops=2, seed=0).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[1] < losses[0], losses
    backends = sorted({name for names in used.values() for name in names})
    assert backends == ["cpu"], used
    print(f"training step: loss {losses[0]:.4f}, with the next weights {losses[1]:.4f}")


def check_commands(folder: Path) -> None:
    tested = command("doctor", "--self-test")
    assert tested.count(" right") >= 18, tested
    print(f"doctor --self-test: {tested.count(' right')} comparisons right")
    run = folder / "run"
    command("train", "--preset", "sudoku6", "--steps", "2", "--eval-size", "2", "--out", run)
    for model in (run, "sudoku9"):
        (sample,) = json.loads(command("sample", model, "--num", "1", "--order", "confidence", "--json"))[
            "samples"
        ]
        print(f"sample of {Path(model).name}: {sample['board']}")


if __name__ == "__main__":
    check_place()
    print(
        f"loopmdm-kernels {lk.__version__}, Python {platform.python_version()}, torch {torch.__version__},"
        f" numpy {np.__version__}, {' '.join(platform.libc_ver())}, {platform.machine()},"
        f" {lk.available_backends()['cpu']}"
    )
    check_step()
    with tempfile.TemporaryDirectory() as made:
        check_commands(Path(made))
