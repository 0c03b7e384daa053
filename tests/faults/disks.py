"""A disk that is full, or fails, at any write of a training: a clear error, the last checkpoint, no rest.

With room again the run goes on to the very bits of one that nothing happened to.
`python -m tests.faults.disks --seed S --count N` repeats N trials from seed S on.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopmdm.train.state import read_metadata
from tests.faults.processes import (
    MEMORY,
    Fault,
    at,
    count_events,
    differences,
    drawn_config,
    in_child,
    kill,
    train,
)
from tests.fuzz.harness import Wrong, main

_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def case(seed: int) -> Counter[str]:
    """One trial; call it in a process that has not computed with torch."""
    draw = random.Random(seed)
    config = drawn_config(draw)
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        whole, run = Path(temporary, "whole"), Path(temporary, "run")
        events = count_events(whole, config)
        if draw.random() < 0.7:  # else the very first write may fail
            in_child(lambda: train(run, config, at(draw.randint(1, events), kill)))
        before, there = _step(run), _hidden(run)
        how, fail = _failure(draw, events)
        status = in_child(lambda: _train_on_a_bad_disk(run, config, fail))
        if status not in (0, 2):
            raise Wrong(f"exit status {status}, {how}, {config}")
        left = _hidden(run)
        if status == 2:  # who cannot even lock the folder leaves there what a kill has left
            left -= there
        if left or _step(run) < before:
            raise Wrong(f"{left} are left, step {before} became {_step(run)}; {how}, {config}")
        if in_child(lambda: train(run, config)) != 0:
            raise Wrong(f"the run cannot go on: {how}, {config}")
        found = differences(run, whole)
        if found:
            raise Wrong(f"{how}, {config}: {'; '.join(found)[:2000]}")
    return Counter({"trainings": 1, "failed writes": int(status == 2)})


def _hidden(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if path.name.startswith(".")} if run.exists() else set()


def _step(run: Path) -> int:
    """The step of the checkpoint, which must be whole; -1 where there is none."""
    path = run / "training_state.safetensors"
    return int(read_metadata(path)["counters"]["step"]) if path.exists() else -1


def _failure(draw: random.Random, events: int) -> tuple[str, Callable[[], Fault | None]]:
    """How a disk fails, in words, and what makes it fail in a child."""
    if draw.random() < 0.3:
        size = int(2 ** draw.uniform(0, 17))

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        return f"files of at most {size} bytes", limit
    moment, number = draw.randint(1, events), draw.choice(_ERRORS)
    lasting = draw.random() < 0.5

    def fault() -> Fault:
        seen = 0

        def fail(name: str) -> None:
            nonlocal seen
            seen += name != "step"
            failing = name not in ("step", "os.remove", "os.rmdir")
            if failing and (seen >= moment if lasting else seen == moment):
                raise OSError(number, os.strerror(number))

        return fail

    return f"{errno.errorcode[number]} at write {moment} of {events}{', lasting' if lasting else ''}", fault


def _train_on_a_bad_disk(run: Path, config: dict[str, Any], fail: Callable[[], Fault | None]) -> None:
    try:
        train(run, config, fail() or (lambda name: None))
    except OSError as error:
        text = str(error)
        os._exit(2 if text and text.isprintable() else 3)


if __name__ == "__main__":
    sys.exit(main("disks", case, __doc__, package="tests.faults"))
