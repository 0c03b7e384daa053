"""A rank that is lost at any moment: the run ends with one error, and goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lost_processes
import pytest
from ranks import free_port

from tests.fuzz.kills import OPTIONS, campaign, environment, records


def test_a_killed_rank_ends_the_run_which_then_resumes_bitwise(tmp_path: Path) -> None:
    result = campaign(tmp_path, kills=1, ranks=2, form="ddp", steps=30, longest=0.5, seed=0)
    (life,) = result["lives"]
    assert not life["early"] and life["equal"] and life["steps"] < 30
    assert len(life["errors"]) == 1 and "another process of this run has ended" in life["errors"][0]
    assert result["runs_bitwise"] == len(result["runs"]) == 1


FAILS = """
import os, signal, sys
from types import SimpleNamespace
from loopmdm.cli import runs
runs.dist.is_initialized = lambda: sys.argv[1] == "torchrun"
try:
    with runs._stop_on_signals(SimpleNamespace(request_stop=lambda: None)):
        raise RuntimeError("the other one is gone")
except RuntimeError as error:
    os.kill(os.getpid(), signal.SIGTERM)  # torchrun has noticed too, while this process closes its files
    print(error)
"""


@pytest.mark.parametrize(
    ("started_by", "status", "said"),
    [("torchrun", 0, "the other one is gone\n"), ("hand", -signal.SIGTERM, "")],
)
def test_a_process_that_fails_says_why_before_torchrun_ends_it(
    started_by: str, status: int, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS, started_by], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (status, said), done.stderr


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("lost")
    paths = [str(Path(__file__).parent), environment()["PYTHONPATH"]]
    done = subprocess.run(
        [sys.executable, lost_processes.__file__, str(folder)],
        env=environment() | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("name", lost_processes.CASES)
def test_a_process_that_is_lost_anywhere_ends_the_run(lost: tuple[Path, dict[str, int]], name: str) -> None:
    """Also one that vanishes with its node and closes nothing, and while the other has work of its own."""
    folder, statuses = lost
    victim = lost_processes.CASES[name][1]
    said = [(folder / name.replace(" ", "-") / str(rank)).read_text() for rank in range(2)]
    errors = [[line for line in text.splitlines() if "error" in line] for text in said]
    assert statuses[name] == 1
    if name == "failure":
        assert errors == [[], ["loopmdm train: error: planted"]]
        return
    of = "the next process" if victim else "the store of the run"
    (error,) = errors[1 - victim]
    assert error.startswith("loopmdm train: error: another process of this run does not answer ")
    assert f"(rank {1 - victim} sees: no sign of life of {of} for 8 s); checkpoints are intact" in error
    assert not errors[victim]
    last = {"checkpoint": ["step-00000000"], "start": [], "export": ["step-00000010"]}
    kept = sorted(path.name for path in (folder / name.replace(" ", "-")).glob("run/checkpoints/*"))
    assert kept[-1:] == last.get(name, ["step-00000005"])


# A command line whose second process gets its first batch late, and that of step 5 never.
HANGS = """
import os, sys, threading, time
from loopmdm.cli import main
from loopmdm.train.batches import Prefetcher

get = Prefetcher.get

def hanging(self, step, index):
    if os.environ["RANK"] == "1":
        time.sleep(10 if step == 0 else 0)
        threading.Event().wait(None if step == 5 else 0)
    return get(self, step, index)

Prefetcher.get = hanging
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_hangs_ends_the_run(tmp_path: Path) -> None:
    """It is alive and does not answer. The first step may take longer than a process waits in later ones."""
    (tmp_path / "text.txt").write_text("A line of text.\n" * 500)
    words = f"train --out {tmp_path / 'run'} --data {tmp_path / 'text.txt'} --steps 9 --timeout-minutes 0.15"
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
    assert "Timed out waiting 9000ms" in last and max(r["step"] for r in records(tmp_path / "run")) == 5
    assert last.endswith("checkpoints are intact, and --resume continues from the last one")
