"""The folder of a run: one writer, nothing foreign replaced, no link followed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_training import ToyModel, batches

from loopmdm.train import RunFolder, TrainConfig, Trainer, read_metrics
from loopmdm.train.loop import FILES
from loopmdm_kernels.files import temporary_path
from loopmdm_kernels.locks import LOCK_FILE, LockedError

CONFIG: dict[str, Any] = {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "log_every": 1}


def trainer(out: Path | RunFolder, **changes: Any) -> Trainer:
    return Trainer(ToyModel(), batches, TrainConfig(**(CONFIG | changes)), out, show_progress=False)


def contents(folder: Path) -> dict[str, Any]:
    """Every path below a folder with what it holds."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_stay(tmp_path: Path, name: str, resume: bool) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/notes.txt").write_text("mine")
    (tmp_path / "readme.txt").write_text("mine")
    (tmp_path / name).write_text('{"my": "settings"}')
    before = contents(tmp_path)
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match=f"{name}|holds a run already"):
        run.resume() if resume else run.train()
    assert contents(tmp_path) == before


def test_other_files_are_no_obstacle_and_stay(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/notes.txt").write_text("mine")
    (tmp_path / "notes.json").write_text("mine")
    trainer(tmp_path).train()
    assert (tmp_path / ".partial/notes.txt").read_text() == (tmp_path / "notes.json").read_text() == "mine"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*FILES, ".partial", "notes.json"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("resume", [False, True])
def test_links_are_not_followed(tmp_path: Path, name: str, resume: bool) -> None:
    """Neither in a new folder nor in that of a run, whose file has been moved away."""
    out, target = tmp_path / "run", tmp_path / "target"
    out.mkdir()
    if resume:
        trainer(out).train()
        (out / name).rename(target)
    else:
        target.write_text("mine")
    (out / name).symlink_to(target)
    before, held = contents(out), target.read_bytes()
    run = trainer(out, steps=8, schedule="constant")
    with pytest.raises(ValueError, match=f"{name} is a link; a run writes regular files only"):
        run.resume() if resume else run.train()
    assert contents(out) == before and target.read_bytes() == held


def test_a_link_to_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    trainer(tmp_path / "run").train()
    assert (tmp_path / "run").is_symlink() and len(read_metrics(tmp_path / "disk/metrics.jsonl")) == 6


def test_a_lock_cannot_be_a_link_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "target").write_text("mine")
    (tmp_path / "run" / LOCK_FILE).symlink_to("../target")
    with pytest.raises(OSError):
        trainer(tmp_path / "run").train()
    assert (tmp_path / "target").read_text() == "mine"


def test_two_at_once(tmp_path: Path) -> None:
    """The second is refused before it changes anything, and the first goes on as if alone."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    trainer(alone).train()
    refused = []

    def other(record: dict[str, Any]) -> None:
        before = contents(shared)
        for start in (trainer(shared).resume, trainer(shared).train):
            with pytest.raises(LockedError, match=f"shared is in use by process {os.getpid()} on "):
                start()
        assert contents(shared) == before
        refused.append(record["step"])

    first = Trainer(ToyModel(), batches, TrainConfig(**CONFIG), shared, other, show_progress=False)
    first.train()
    assert refused == [1, 2, 3, 4, 5, 6]
    losses = [[record["loss"] for record in read_metrics(out / "metrics.jsonl")] for out in (alone, shared)]
    assert losses[0] == losses[1] and sorted(os.listdir(alone)) == sorted(os.listdir(shared)) == sorted(FILES)


def test_the_lock_is_free_after_a_failure_and_after_the_end(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    with pytest.raises(ValueError, match="belongs to another run"):
        trainer(tmp_path, seed=4).resume()
    with pytest.raises(ValueError, match="holds a run already"):
        trainer(tmp_path).train()
    again = trainer(tmp_path)
    assert again.resume() == 6 and (tmp_path / LOCK_FILE).exists()
    with pytest.raises(LockedError):
        trainer(tmp_path).resume()
    again.train()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_the_caller_holds(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a/run", FILES) as held:
        run = trainer(held)
        assert run.resume() == 0
        run.train()
        with pytest.raises(LockedError):
            RunFolder(tmp_path / "a/run", FILES)
    RunFolder(tmp_path / "a/run", FILES).release()


def test_folders_that_stay_empty_are_removed_again(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for path in ("new/run", "there/run"):
        RunFolder(tmp_path / path, FILES).release()
    RunFolder(tmp_path / "there", FILES).release()
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == []


_TRAIN = """
import json, os, signal, sys
from toy_training import ToyModel, batches
from loopmdm.train import TrainConfig, Trainer

def kill(record):
    if record["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)

config = TrainConfig(**json.loads(sys.argv[2]))
Trainer(ToyModel(), batches, config, sys.argv[1], kill, show_progress=False).train()
"""


def test_after_sigkill_the_run_goes_on_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", _TRAIN, str(out), json.dumps(CONFIG)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert (out / LOCK_FILE).exists()
    temporary_path(out).mkdir()
    resumed = trainer(out)
    assert resumed.resume() == 2
    resumed.train()
    trainer(tmp_path / "whole").train()
    histories = [read_metrics(folder / "metrics.jsonl") for folder in (out, tmp_path / "whole")]
    assert [r["loss"] for r in histories[0]] == [r["loss"] for r in histories[1]]
    assert sorted(os.listdir(out)) == sorted(FILES)
