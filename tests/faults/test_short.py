"""The short form of kills and failing disks; `make fuzz` has the long one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import differences
from tests.train.toy_training import ToyModel, batches

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name, seed, what", [("kills", 0, "kills"), ("disks", 0, "failed writes")])
def test_trials(name: str, seed: int, what: str) -> None:
    """In a process of their own, since they fork."""
    command = [sys.executable, "-m", f"tests.faults.{name}", "--seed", str(seed), "--count", "3"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(rf"(\d+) {what}", done.stdout)
    assert "3 trainings" in done.stdout and counted is not None and int(counted[1]) >= 1, done.stdout


def test_a_difference_is_found(tmp_path: Path) -> None:
    import torch

    from loopmdm.train import TrainConfig, Trainer

    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        config = TrainConfig(steps=2, batch_size=1, log_every=1)
        Trainer(ToyModel(), batches, config, folder, show_progress=False).train()
    assert differences(run, whole) == []
    model = ToyModel()
    with torch.no_grad():
        model.mix[0, 0] += 1
    model.save_pretrained(run)
    assert "model.safetensors: mix" in differences(run, whole)
    (run / ".loopmdm-0123456789abcdef.tmp").write_text("left")
    assert differences(run, whole)[0].startswith("files ")
