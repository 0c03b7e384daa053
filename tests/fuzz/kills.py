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
TIMINGS = ("seconds", "cpu_seconds", "tokens_per_second", "flops_per_second", "peak_memory")
WEIGHTS = "model.safetensors"
OPTIONS = (
    "--hidden 32 --heads 2 --layers 3 --length 32 --batch-size 2 --checkpoint-every 5 --log-every 1"
    " --eval-size 4 --eval-every 50"
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
    words: list[str], log: Path, ranks: int, longest: float, draws: random.Random
) -> dict[str, Any] | None:
    """Starts the run and kills it in the first `longest` seconds of training, one time in five before them.

    Returns:
        What was killed, seconds until all of the run had ended, errors of it; None: it had ended before.
    """
    process = start(words, log)
    early = draws.random() < 0.2
    delay, victim = draws.uniform(0.0, longest), draws.randrange(ranks)
    alive: list[int] = []
    while process.poll() is None and (len(alive) < ranks or not (early or _trains(log))):
        time.sleep(0.02)
        with suppress(OSError):  # one has ended meanwhile
            alive = workers(process, ranks)
    deadline = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is not None:
        assert process.returncode == 0, log.read_text()
        return None
    killed_at = time.monotonic()
    try:
        os.kill(alive[victim], signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        assert process.wait() == 0, log.read_text()
        return None
    process.wait()
    ended = round(time.monotonic() - killed_at, 2)
    errors = re.findall(r"^loopmdm train: error: .*$", log.read_text(), re.MULTILINE)
    return {"victim": victim, "early": early, "ended_after_s": ended, "errors": errors}


def _trains(log: Path) -> bool:
    return re.search(r"^(step|resuming) ", log.read_text(), re.MULTILINE) is not None


def campaign(
    folder: Path, *, kills: int, ranks: int, form: str, steps: int, longest: float, seed: int
) -> dict[str, Any]:
    """Kills, and what became of the runs; a run that is done is compared whole, and another one begins."""
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "python/loopmdm/cli").glob("*.py")))
    (folder / "text.txt").write_text(text[:20_000])
    words: dict[str, Any] = {"ranks": ranks, "steps": steps, "form": form}
    process = start(command(folder, "whole", **words, resume=False), folder / "whole.log")
    assert process.wait() == 0, (folder / "whole.log").read_text()
    expected = records(folder / "whole")
    draws = random.Random(seed)
    lives: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    while len(lives) < kills or len(runs) <= lives[-1]["run"]:
        name = f"killed-{len(runs)}"
        resumed = command(folder, name, **words, resume=True)
        if len(lives) < kills:
            life = one_life(resumed, folder / "killed.log", ranks, longest, draws)
        else:
            life = None
            assert start(resumed, folder / "killed.log").wait() == 0, (folder / "killed.log").read_text()
        got = records(folder / name)
        if life is None:
            same = _same(folder / "whole" / WEIGHTS, folder / name / WEIGHTS)
            left = [path.name for path in (folder / name).glob("*.tmp")]
            runs.append({"run": len(runs), "log_equal": got == expected, "weights_equal": same, "left": left})
            print(json.dumps(runs[-1]), flush=True)
            continue
        logged = sum("loss" in record for record in got)
        lives.append({"run": len(runs), **life, "steps": logged, "equal": got == expected[: len(got)]})
        print(json.dumps(lives[-1]), flush=True)
    return {
        **words,
        "form": form if ranks > 1 else None,
        "kills": len(lives),
        "log_equal_after": sum(life["equal"] for life in lives),
        "slowest_end_s": max(life["ended_after_s"] for life in lives),
        "most_errors": max(len(life["errors"]) for life in lives),
        "runs_bitwise": sum(run["log_equal"] and run["weights_equal"] and not run["left"] for run in runs),
        "runs": runs,
        "lives": lives,
    }


def _same(*paths: Path) -> bool:
    first, second = map(load_file, paths)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--form", choices=("ddp", "fsdp2"), default="fsdp2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--longest", type=float, default=4.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    result = {
        "command": f"python -m tests.fuzz.kills {' '.join(sys.argv[1:])}".partition(" --write")[0],
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
