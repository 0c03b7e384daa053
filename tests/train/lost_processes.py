"""Runs of two processes of which one is lost: python lost_processes.py FOLDER; output in FOLDER/CASE/RANK.

Each process stands for a node. One that vanishes is stopped: its connections stay open, and nothing answers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import free_port
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from loopmdm.cli import heartbeat, main, runs
from loopmdm.runs import evaluation
from loopmdm.train.parallel import Ranks
from tests.fuzz.kills import OPTIONS

STEPS = 10
Lost = Callable[[], None]


def vanish() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("planted")


def in_a_checkpoint(lost: Lost, _: Path) -> None:
    """The second; the first is that of step 0."""
    write, calls = HuggingFaceStorageWriter.write_data, []

    def losing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            lost()
        return write(*arguments)

    HuggingFaceStorageWriter.write_data = losing  # type: ignore[method-assign]


def in_the_export(lost: Lost, _: Path) -> None:
    whole = Ranks.whole_model

    def losing(self: Ranks, averages: Any, everywhere: bool) -> Any:
        if not everywhere:  # as an evaluation has it
            lost()
        return whole(self, averages, everywhere)

    Ranks.whole_model = losing  # type: ignore[method-assign]


def in_an_evaluation(lost: Lost, run: Path) -> None:
    """That of the last step. The checkpoint before it is written in the background, and is there by then."""

    def losing(*_: Any, **__: Any) -> None:
        while not (run / "checkpoints" / f"step-{STEPS // 2:08}").exists():
            time.sleep(0.02)
        lost()

    evaluation.measure_nll = losing  # type: ignore[assignment]


def while_the_first_reads(lost: Lost, _: Path) -> None:
    runs.wait_for_rank_zero = lambda _: lost()  # type: ignore[attr-defined]


# What becomes of which rank, and where, and the form of the run.
CASES: dict[str, tuple[Lost, int, Callable[[Lost, Path], None], str]] = {
    "checkpoint": (vanish, 1, in_a_checkpoint, "ddp"),
    "export": (vanish, 1, in_the_export, "fsdp2"),
    "evaluation": (die, 1, in_an_evaluation, "ddp"),
    "evaluation of the first": (vanish, 0, in_an_evaluation, "ddp"),
    "start": (vanish, 1, while_the_first_reads, "ddp"),
    "failure": (fail, 1, in_an_evaluation, "ddp"),
}


def busy() -> Any:
    """Work of the rank that is left, longer than any run may go on without the other."""
    time.sleep(600)


def work(folder: Path, name: str, rank: int) -> int:
    """What a process does, and its exit status."""
    lost, victim, place, form = CASES[name]
    if rank == victim:
        place(lost, folder / "run")
    elif name in ("evaluation", "start", "failure"):
        place(busy, folder / "run")
    heartbeat.INTERVAL = 0.8  # so that a test does not take the half minute that a run gives
    words = f"train --out {folder / 'run'} --data {folder / 'text.txt'} --parallel {form} --steps {STEPS}"
    return main([*words.split(), *OPTIONS.split()])


def start(folder: Path, name: str) -> list[int]:
    """Processes forked from this one, which has imported everything and computed nothing."""
    folder = folder / name.replace(" ", "-")
    folder.mkdir()
    (folder / "text.txt").write_text("A line of text.\n" * 500)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ["RANK"] = str(rank)
            for number in (1, 2):
                os.dup2(os.open(folder / f"{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            status = 70
            try:
                status = work(folder, name, rank)
            finally:
                os._exit(status)
        children.append(child)
    return children


def status_of(children: list[int], name: str) -> int:
    """How the process that is left ended; the other one is no more after it."""
    victim = CASES[name][1]
    try:
        _, status = os.waitpid(children[1 - victim], 0)
    finally:
        os.kill(children[victim], signal.SIGKILL)
        os.waitpid(children[victim], 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    started = {name: start(Path(sys.argv[1]), name) for name in CASES}
    print(json.dumps({name: status_of(children, name) for name, children in started.items()}))
