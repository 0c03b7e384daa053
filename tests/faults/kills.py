"""SIGKILL at any moment of a training, some times over: the run goes on to the very bits of one never killed.

`python -m tests.faults.kills --seed S --count N` repeats N trials from seed S on.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults.processes import MEMORY, at, count_events, differences, drawn_config, in_child, kill, train
from tests.fuzz.harness import Wrong, main

_MOST_KILLS = 4


def case(seed: int) -> Counter[str]:
    """One trial; call it in a process that has not computed with torch."""
    draw = random.Random(seed)
    config = drawn_config(draw)
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        whole, run = Path(temporary, "whole"), Path(temporary, "run")
        events = count_events(whole, config)
        kills = 0
        for _ in range(draw.randint(1, _MOST_KILLS)):
            moment = draw.randint(1, events)
            status = in_child(lambda moment=moment: train(run, config, at(moment, kill)))  # type: ignore[misc]
            if status not in (0, -signal.SIGKILL):
                raise Wrong(f"exit status {status} at event {moment} of {events}, {config}")
            kills += status != 0
        if in_child(lambda: train(run, config)) != 0:
            raise Wrong(f"the run cannot go on after {kills} kills, {config}")
        found = differences(run, whole)
        if found:
            raise Wrong(f"after {kills} kills, {config}: {'; '.join(found)[:2000]}")
    return Counter({"trainings": 1, "kills": kills})


if __name__ == "__main__":
    sys.exit(main("kills", case, __doc__, package="tests.faults"))
