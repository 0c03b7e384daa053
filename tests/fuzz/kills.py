"""Training that is killed again and again: python -m tests.fuzz.kills --kills 20 --ranks 2 --write FILE.

A run of one process, or of several under torchrun, gets SIGKILL at a random moment, each time in a random
process of it, and is resumed. After every kill its log has to be that of a run that nobody killed, number for
number, as far as it goes; at the end its weights have to be the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from loopmdm.train import read_metrics

ROOT = Path(__file__).parents[2]
TIMINGS = ("seconds", "cpu_seconds", "tokens_per_second")
WEIGHTS = "model.safetensors"
OPTIONS = (
    "--hidden 32 --heads 2 --layers 3 --length 32 --batch-size 2 --checkpoint-every 4 --log-every 1"
    " --eval-size 4 --eval-every 100"
)


def command(folder: Path, out: str, ranks: int, steps: int, *, form: str, resume: bool) -> list[str]:
    """Begins a run, or goes on with it."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    words = [*start, "loopmdm", "train", "--out", str(folder / out)]
    words += ["--parallel", form] if ranks > 1 else []
    if resume:
        words.append("--resume")
    words += ["--data", str(folder / "text.txt"), "--steps", str(steps)]
    return words + OPTIONS.split()


def environment() -> dict[str, str]:
    paths = [str(ROOT / "python"), str(ROOT), *filter(None, sys.path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def workers(process: subprocess.Popen[Any], ranks: int) -> list[int]:
    """The processes that train, by their numbers."""
    if ranks == 1:
        return [process.pid]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"loopmdm" in Path("/proc", child, "cmdline").read_bytes()]


def start(words: list[str], log: Path) -> subprocess.Popen[Any]:
    with log.open("w") as file:
        return subprocess.Popen(words, env=environment(), stdout=file, stderr=subprocess.STDOUT)


def records(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in read_metrics(path)]


def one_life(
    words: list[str], log: Path, ranks: int, delay: float, draws: random.Random
) -> dict[str, Any] | None:
    """Starts the run and kills it after `delay` seconds of life; None: it had ended before.

    Returns:
        What was killed, seconds until all of the run had ended, errors of it.
    """
    process = start(words, log)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    alive: list[int] = []
    while process.poll() is None and len(alive) < ranks:  # torchrun has not started them all
        time.sleep(0.02)
        with suppress(OSError):  # one has ended meanwhile
            alive = workers(process, ranks)
    if process.poll() is not None:
        assert process.returncode == 0, log.read_text()
        return None
    victim = draws.randrange(ranks)
    killed_at = time.monotonic()
    os.kill(alive[victim], signal.SIGKILL)
    process.wait()
    errors = re.findall(r"^loopmdm train: error: .*$", log.read_text(), re.MULTILINE)
    return {"victim": victim, "ended_after_s": round(time.monotonic() - killed_at, 2), "errors": errors}


def campaign(
    folder: Path, *, kills: int, ranks: int, form: str, steps: int, longest: float, seed: int
) -> dict[str, Any]:
    """Kills of one run, and what became of it.

    longest: seconds that a start may live. steps: of the run; if it is done before the last kill, the rest of
    the kills do not happen, which `kills` tells.
    """
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "python/loopmdm/cli").glob("*.py")))
    (folder / "text.txt").write_text(text[:20_000])
    words = {"ranks": ranks, "steps": steps, "form": form}
    process = start(command(folder, "whole", **words, resume=False), folder / "whole.log")
    assert process.wait() == 0, (folder / "whole.log").read_text()
    expected = records(folder / "whole")
    draws = random.Random(seed)
    lives: list[dict[str, Any]] = []
    while len(lives) < kills:
        life = one_life(
            command(folder, "killed", **words, resume=True),
            folder / "killed.log",
            ranks,
            draws.uniform(0.0, longest),
            draws,
        )
        if life is None:
            break
        got = records(folder / "killed")
        life |= {"steps_logged": len([r for r in got if "loss" in r]), "equal": got == expected[: len(got)]}
        lives.append(life)
        print(json.dumps(life), flush=True)
    process = start(command(folder, "killed", **words, resume=True), folder / "killed.log")
    ended = process.wait() == 0
    weights = [load_file(folder / name / WEIGHTS) for name in ("whole", "killed")] if ended else [{}, {"": 0}]
    same = weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )
    return {
        **words,
        "kills": len(lives),
        "equal_after_kill": sum(life["equal"] for life in lives),
        "slowest_end_s": max((life["ended_after_s"] for life in lives), default=None),
        "most_errors": max((len(life["errors"]) for life in lives), default=None),
        "log_equal": records(folder / "killed") == expected,
        "weights_equal": same,
        "left_over": [path.name for path in (folder / "killed").glob("*.tmp")],
        "lives": lives,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--form", choices=("ddp", "fsdp2"), default="fsdp2")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--longest", type=float, default=15.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    result = {
        "command": f"python -m tests.fuzz.kills {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} processors",
    }
    result |= campaign(
        folder,
        kills=args.kills,
        ranks=args.ranks,
        form=args.form,
        steps=args.steps,
        longest=args.longest,
        seed=args.seed,
    )
    shutil.rmtree(folder)
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if args.write is not None:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
