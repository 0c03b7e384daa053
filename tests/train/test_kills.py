"""A rank that is killed under torchrun: the run ends with one error, and goes on to the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ranks import free_port

from tests.fuzz.kills import OPTIONS, campaign, environment


def test_a_killed_rank_ends_the_run_which_then_resumes_bitwise(tmp_path: Path) -> None:
    result = campaign(tmp_path, kills=1, ranks=2, form="ddp", steps=30, longest=0.5, seed=0)
    (life,) = result["lives"]
    assert not life["early"] and life["equal"] and life["steps"] < 30
    assert len(life["errors"]) == 1 and "another process of this run has ended" in life["errors"][0]
    assert result["runs_bitwise"] == len(result["runs"]) == 1


# A command line whose second process never gets the batch of step 5.
HANGS = """
import os, sys, threading
from loopmdm.cli import main
from loopmdm.train.batches import Prefetcher

get = Prefetcher.get

def hanging(self, step, index):
    if step == 5 and os.environ["RANK"] == "1":
        threading.Event().wait()
    return get(self, step, index)

Prefetcher.get = hanging
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_hangs_ends_the_run(tmp_path: Path) -> None:
    """As one whose node is lost: its connections stay open, and it does not answer."""
    (tmp_path / "text.txt").write_text("A line of text.\n" * 500)
    words = f"train --out {tmp_path / 'run'} --data {tmp_path / 'text.txt'} --steps 9 --timeout-minutes 0.25"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HANGS, *words.split(), *OPTIONS.split()],
            env=environment() | address | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, errors = processes[0].communicate()
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith("loopmdm train: error: another process of this run does not answer (rank 0 sees: ")
    assert last.endswith("checkpoints are intact, and --resume continues from the last one")
