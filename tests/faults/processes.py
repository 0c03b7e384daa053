"""Small trainings in processes of their own, in which something goes wrong at a chosen moment.

A child is forked, so that it starts at once. The parent must not have computed with torch, whose threads do
not survive a fork; everything is computed in children.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from loopmdm.train import TrainConfig, Trainer, read_metrics
from loopmdm.train.metrics import MetricsLog
from tests.train.toy_training import ToyModel, batches

Fault = Callable[[str], None]
"""Called before each event with its name; does nothing, raises an error, or ends the process."""

# Where waiting for the disk, which these trainings do most of the time, takes none.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
TIMINGS = ("seconds", "cpu_seconds", "tokens_per_second", "flops_per_second", "peak_memory")
_AUDITED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}


def in_child(work: Callable[[], None]) -> int:
    """What became of the work: 0, 1 (an error, printed), or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def drawn_config(draw: random.Random) -> dict[str, Any]:
    return {
        "steps": draw.randint(4, 16),
        "batch_size": draw.randint(1, 4),
        "accumulation": draw.randint(1, 2),
        "learning_rate": 1e-2,
        "warmup_steps": draw.randint(0, 4),
        "schedule": draw.choice(["constant", "cosine", "linear"]),
        "log_every": draw.randint(1, 3),
        "checkpoint_every": draw.randint(1, 6),
        "seed": draw.randrange(100),
    }


def train(folder: Path, config: dict[str, Any], fault: Fault | None = None) -> None:
    """Go on with the run in the folder, or begin it."""
    trainer = Trainer(ToyModel(), batches, TrainConfig(**config), folder, show_progress=False)
    if fault is not None:
        watch(fault)
    trainer.resume()
    trainer.train()


def watch(fault: Fault) -> None:
    """Call `fault` before each change of a file, each step and each record, for the life of this process."""

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        # of "open", those for writing only: a mode, or flags beyond O_CLOEXEC
        if name in _AUDITED and (name != "open" or _writes(*arguments[1:3])):
            fault(name)

    step, write, fsync = Trainer._step, MetricsLog.write, os.fsync

    def watched_step(self: Trainer, number: int) -> Any:
        fault("step")
        return step(self, number)

    def watched_write(self: MetricsLog, record: dict[str, Any]) -> None:
        try:
            fault("record")
        except OSError:
            self._file.write('{"step": 1, "lo')  # a part of a line may be there
            raise
        write(self, record)

    def watched_fsync(descriptor: int) -> None:
        fault("fsync")
        fsync(descriptor)

    Trainer._step = watched_step  # type: ignore[method-assign]
    MetricsLog.write = watched_write  # type: ignore[method-assign]
    os.fsync = watched_fsync
    sys.addaudithook(hook)


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def count_events(folder: Path, config: dict[str, Any]) -> int:
    """Run to the end without a fault; how many events there were."""
    count = folder.with_name("count")

    def work() -> None:
        seen = 0

        def fault(name: str) -> None:
            nonlocal seen
            seen += 1

        train(folder, config, fault)
        total = seen
        count.write_text(str(total))

    assert in_child(work) == 0
    return int(count.read_text())


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(number: int, act: Fault) -> Fault:
    """A fault that acts at the number-th event, counted from 1."""
    seen = 0

    def fault(name: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            act(name)

    return fault


def differences(folder: Path, whole: Path) -> list[str]:
    """In what a run differs from one that nothing happened to; bit for bit but for its timings."""
    found = []
    names = [sorted(path.name for path in each.iterdir()) for each in (folder, whole)]
    if names[0] != names[1]:
        return [f"files {names[0]}, expected {names[1]}"]
    histories = [_history(each) for each in (folder, whole)]
    if histories[0] != histories[1]:
        found.append(f"records {histories[0]}, expected {histories[1]}")
    for name in ("training_state.safetensors", "model.safetensors"):
        got, expected = load_file(folder / name), load_file(whole / name)
        if got.keys() != expected.keys():
            found.append(f"{name}: tensors {sorted(set(got) ^ set(expected))}")
        else:
            found += [f"{name}: {key}" for key in got if not torch.equal(got[key], expected[key])]
    for name in ("config.json", "train_config.json"):
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            found.append(name)
    return found


def _history(folder: Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]
