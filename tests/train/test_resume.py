"""Checkpoints: exact resumption, kills at any moment, full disks, files of other runs (E16)."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_training import ToyModel, batches

import loopmdm.formats.safetensors_files
from loopmdm.data.batches import Batch
from loopmdm.model import LoopMDM
from loopmdm.model.config import LoopMDMConfig
from loopmdm.train import CheckpointError, TrainConfig, Trainer, read_metrics
from loopmdm_kernels.files import temporary_path

STEPS = 40
CONFIG: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 4,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
    "schedule": "cosine",
    "log_every": 1,
    "checkpoint_every": 20,
    "seed": 3,
}
TIMINGS = ("seconds", "cpu_seconds", "tokens_per_second", "flops_per_second", "peak_memory")


class Killed(BaseException):
    """Stands for a kill between two steps."""


def trainer(folder: Path, model: Any = None, kill_at: int | None = None, **changes: Any) -> Trainer:
    def on_log(record: dict[str, Any]) -> None:
        if record["step"] == kill_at:
            raise Killed

    config = TrainConfig(**(CONFIG | changes))
    return Trainer(model or ToyModel(), batches, config, folder, on_log, show_progress=False)


def history(folder: Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer(folder).train()
    return folder


def test_e16_resumed_losses_are_bitwise_equal_for_20_steps(tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(Killed):
        trainer(tmp_path, kill_at=27).train()
    resumed = trainer(tmp_path, ToyModel(seed=9))
    assert resumed.resume() == 20
    assert len(history(tmp_path)) == 20
    resumed.train()
    assert history(tmp_path) == history(uninterrupted) and len(history(tmp_path)) == STEPS
    for name in ("training_state.safetensors", "model.safetensors"):
        got, expected = load_file(tmp_path / name), load_file(uninterrupted / name)
        assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_e16_real_model_with_dropout_resumes_bitwise_and_exports_the_average(tmp_path: Path) -> None:
    def source(*arguments: int) -> Batch:
        batch = batches(*arguments)
        return batch._replace(prompt_mask=batch.input_ids == 2)

    def new(folder: str, seed: int, kill_at: int | None = None) -> Trainer:
        torch.manual_seed(seed)
        model = LoopMDM(
            LoopMDMConfig(
                7,
                6,
                hidden_size=16,
                num_heads=2,
                num_layers=3,
                cond_dim=4,
                loop_end=2,
                max_loops=3,
                max_length=8,
            )
        )
        built = trainer(tmp_path / folder, model, kill_at, checkpoint_every=5, steps=25)
        built._source = source
        return built

    new("a", 0).train()
    with pytest.raises(Killed):
        new("b", 0, kill_at=8).train()
    resumed = new("b", 1)
    assert resumed.resume() == 5
    resumed.train()
    assert history(tmp_path / "a") == history(tmp_path / "b")
    exported = LoopMDM.from_pretrained(tmp_path / "b")
    assert exported.config == resumed.model.config
    averages = dict(zip(resumed.ema.names, resumed.ema.shadow, strict=True))
    assert all(torch.equal(p, averages[name]) for name, p in exported.named_parameters())


def test_resuming_a_finished_run_adds_nothing_and_more_steps_continue_it(tmp_path: Path) -> None:
    longer = tmp_path / "longer"
    trainer(longer, schedule="constant").train()
    short = tmp_path / "short"
    trainer(short, schedule="constant", steps=30).train()
    again = trainer(short, ToyModel(seed=5), schedule="constant", steps=30)
    assert again.resume() == 30
    again.train()
    assert len(history(short)) == 30
    extended = trainer(short, ToyModel(seed=5), schedule="constant")
    extended.resume()
    extended.train()
    assert history(short) == history(longer)


def test_a_run_is_not_overwritten(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match="holds a run already: resume it"):
        trainer(uninterrupted).train()


def test_another_configuration_or_model_is_refused(uninterrupted: Path) -> None:
    with pytest.raises(
        ValueError, match=r"belongs to another run: learning_rate was 0\.01, is 0\.02; seed was 3"
    ):
        trainer(uninterrupted, learning_rate=0.02, seed=4).resume()
    with pytest.raises(ValueError, match="do not fit the model"):
        trainer(uninterrupted, ToyModel(width=12)).resume()


def test_damaged_state_is_refused(tmp_path: Path, uninterrupted: Path) -> None:
    content = (uninterrupted / "training_state.safetensors").read_bytes()
    (tmp_path / "training_state.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or is no safetensors file"):
        trainer(tmp_path).resume()
    exported = (uninterrupted / "model.safetensors").read_bytes()
    (tmp_path / "training_state.safetensors").write_bytes(exported)
    with pytest.raises(ValueError, match="no training state of loopmdm"):
        trainer(tmp_path).resume()


def test_a_cut_last_line_is_dropped(tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(Killed):
        trainer(tmp_path, kill_at=33).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 34, "loss": 0.1')
    resumed = trainer(tmp_path)
    assert resumed.resume() == 20
    resumed.train()
    assert history(tmp_path) == history(uninterrupted)


@pytest.mark.parametrize("renames", range(3))
def test_killed_between_the_renames_of_a_checkpoint(
    tmp_path: Path, uninterrupted: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        nonlocal done
        if built.counters.step == 20:
            if done == renames:
                raise Killed
            done += Path(source).parent.name.startswith(".loopmdm-")
        replace(source, target)

    built = trainer(tmp_path, checkpoint_every=10)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", interrupted)
        built.train()
    left = temporary_path(tmp_path)  # by a kill that leaves no time to clean up
    left.mkdir()
    (left / "training_state.safetensors").write_bytes(b"cut short")
    resumed = trainer(tmp_path, ToyModel(seed=7), checkpoint_every=10)
    assert resumed.resume() in (10, 20)
    resumed.train()
    assert history(tmp_path) == history(uninterrupted)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in uninterrupted.iterdir())


def test_kill_9_at_random_moments_then_resume(tmp_path: Path, uninterrupted: Path) -> None:
    """Every start may be killed, in the middle of a step or of a write; the outcome is that of one run."""
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys, torch\n"
        "from pathlib import Path\n"
        "from toy_training import ToyModel, batches\n"
        "from loopmdm.train import TrainConfig, Trainer\n"
        "config = TrainConfig(**json.loads(sys.argv[2]))\n"
        "trainer = Trainer(ToyModel(), batches, config, sys.argv[1], show_progress=False)\n"
        "trainer.resume()\n"
        "print('ready', flush=True)\n"
        "trainer.train()\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    folder = tmp_path / "run"
    command = [sys.executable, str(script), str(folder), json.dumps(CONFIG | {"checkpoint_every": 3})]
    delays = random.Random(0)
    kills = 0
    for attempt in range(4):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as output:
            assert output.readline() == b"ready\n"
            if attempt < 3:
                time.sleep(delays.uniform(0.0, 0.1))
                process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    assert history(folder) == history(uninterrupted)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in uninterrupted.iterdir())


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail with a real OSError (EFBIG), as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("failure", ["file size limit", "no space for the state", "no space for the weights"])
def test_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wide(folder: str, kill_at: int | None = None) -> Trainer:
        return trainer(tmp_path / folder, ToyModel(width=64), kill_at)

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    wide("whole").train()
    with pytest.raises(Killed):
        wide("run", kill_at=27).train()
    folder = tmp_path / "run"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    resumed = wide("run")
    resumed.resume()
    with pytest.raises(CheckpointError, match="the previous one is intact: "), monkeypatch.context() as patch:
        if failure == "file size limit":
            with files_limited_to(32_768):
                resumed.train()
        elif failure == "no space for the state":
            patch.setattr(loopmdm.formats.safetensors_files, "write", no_space)
            resumed.train()
        else:
            patch.setattr(ToyModel, "save_pretrained", no_space)
            resumed.train()
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name != "metrics.jsonl")
    again = wide("run")
    assert again.resume() == 20
    again.train()
    assert history(folder) == history(tmp_path / "whole")
