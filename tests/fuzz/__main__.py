"""All fuzzers side by side for some minutes, `make fuzz MINUTES=60`; prints once a minute what they did.

A worker that dies is a crash, one that sits on a case beyond its limit a hang; both are ended, told with the
line that repeats them, and replaced. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import IO, NamedTuple

from tests.fuzz.harness import first_seed, reproduction
from tests.fuzz.worker import STATUS

ROOT = Path(__file__).parents[2]


class Kind(NamedTuple):
    workers: int
    limit: float  # seconds of processor time a case may take; so many times longer if it does not work
    memory: int = 0  # bytes of address space beyond what a worker has after its first case; 0: any


KINDS = {
    "ops": Kind(4, 60),
    "sampler": Kind(2, 60),
    "files": Kind(2, 30, 2 * 2**30),
    "threads": Kind(1, 120),
    "faults": Kind(1, 300),
}


_IDLE = 5  # a machine that does much else gives a worker less than its time
_LOADING = 120.0  # seconds of processor time for what the first case of a process loads


class Run:
    """Workers, what they said, and what went wrong."""

    def __init__(self, seed: int, minutes: float, log: IO[str] | None) -> None:
        self.seed, self.start = seed, time.time()
        self.end = self.start + 60 * minutes
        self.minutes, self.log = minutes, log
        self.counts: dict[str, Counter[str]] = {}
        self.failures: dict[str, list[str]] = {}
        self.crashes: Counter[str] = Counter()
        self.hangs: Counter[str] = Counter()
        self.notes: dict[str, str] = {}
        self.summaries: list[str] = []
        self.lock = threading.Lock()

    def say(self, text: str) -> None:
        print(text, flush=True)
        if self.log is not None:
            self.log.write(text + "\n")
            self.log.flush()

    def fail(self, kind: str, text: str) -> None:
        with self.lock:
            self.failures.setdefault(kind, []).append(text)
        self.say(f"FAILED {text}")

    def hear(self, kind: str, line: str) -> None:
        """One line of a worker."""
        try:
            said = json.loads(line)
        except ValueError:
            return
        if "failed" in said:
            where = reproduction(kind, said["seed"]) if "seed" in said else kind
            self.fail(kind, f"{where}\n  {said['failed']}")
        with self.lock:
            self.counts.setdefault(kind, Counter()).update(said.get("counts", {}))
            if "note" in said:
                self.notes[kind] = said["note"]
            if "summary" in said:
                self.summaries.append(said["summary"])

    def worker(self, name: str, number: int) -> None:
        """Keeps one process of a fuzzer at work until the end; runs in a thread of its own."""
        kind, seed = KINDS[name], first_seed(self.seed, number)
        while time.time() < self.end:
            with tempfile.NamedTemporaryFile() as status:
                status.write(STATUS.pack(seed, 0.0, 0.0))
                status.flush()
                command = [sys.executable, "-m", "tests.fuzz.worker", name, str(seed), str(self.end)]
                process, listener = self._start([*command, status.name, str(kind.memory)], name)
                hung = self._watch(process, status.name, kind.limit)
                listener.join()
                at, *_ = STATUS.unpack(Path(status.name).read_bytes())
            if hung:
                self.hangs[name] += 1
                self.fail(name, f"{reproduction(name, at)}\n  hangs: no end within {kind.limit:g} s")
            elif process.returncode:
                self.crashes[name] += 1
                self.fail(name, f"{reproduction(name, at)}\n  crashes: exit status {process.returncode}")
            seed = at + 1

    def soak(self) -> None:
        minutes = (self.end - time.time()) / 60
        command = [sys.executable, "-m", "tests.fuzz.soak", "--minutes", f"{minutes:.3f}"]
        process, listener = self._start(command, "soak")
        listener.join()
        if process.wait():
            self.crashes["soak"] += 1
            self.fail("soak", f"soak crashes: exit status {process.returncode}")

    def _start(self, command: list[str], name: str) -> tuple[subprocess.Popen[str], threading.Thread]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        listener = threading.Thread(target=self._listen, args=(name, process.stdout), daemon=True)
        listener.start()
        return process, listener

    def _listen(self, name: str, lines: IO[str] | None) -> None:
        assert lines is not None
        with lines:
            for line in lines:
                self.hear(name, line)

    def _watch(self, process: subprocess.Popen[str], status: str, limit: float) -> bool:
        """Whether the process had to be ended for sitting on a case."""
        started = time.monotonic()
        while process.poll() is None:
            time.sleep(0.5)
            _, began, spent = STATUS.unpack(Path(status).read_bytes())
            waited = time.monotonic() - (began or started)
            worked = processor_time(process.pid) - spent
            allowed = limit if began else max(limit, _LOADING)
            if waited > allowed and (worked > allowed or waited > _IDLE * allowed):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
        return False

    def table(self) -> None:
        self.say("")
        for name, counts in self.counts.items():
            for what, number in sorted(counts.items()):
                self.say(f"{name:<8} {what:<36} {number:>10}")
        wrong = {
            name: len(told) - self.crashes[name] - self.hangs[name] for name, told in self.failures.items()
        }
        for text, found in (("crashes", self.crashes), ("hangs", self.hangs), ("other failures", wrong)):
            self.say(f"{text:<45} {sum(found.values()):>10}")
        for text in self.summaries:
            self.say(text)


def processor_time(pid: int) -> float:
    """Seconds that a process has been at work; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def commit() -> str:
    """What is tried; "unknown" where it is no git checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> str:
    import torch

    from loopmdm_kernels import _C

    about = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in about if line.startswith("model name")), "")
    return (
        f"{platform.platform()}, {cpu or platform.machine()}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, torch {torch.__version__}; instruction sets {_C.usable_cpu_isas()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="of all seeds; default: from the clock")
    parser.add_argument("--only", nargs="+", choices=[*KINDS, "soak"], help="these kinds alone")
    parser.add_argument("--log", type=Path, help="also write what is printed to this file")
    args = parser.parse_args()
    names = args.only or [name for name in (*KINDS, "soak") if (ROOT / f"tests/fuzz/{name}.py").is_file()]
    seed = int(time.time()) % 2**20 if args.seed is None else args.seed
    log = None
    if args.log:
        args.log.parent.mkdir(parents=True, exist_ok=True)
        log = args.log.open("w", encoding="utf-8")
    run = Run(seed, args.minutes, log)
    now, load = time.strftime("%Y-%m-%d %H:%M:%S"), os.getloadavg()[0]
    run.say(
        f"{now} fuzz: {args.minutes:g} minutes, seed {seed}, commit {commit()}, load {load:.1f}; {versions()}"
    )
    threads = [
        threading.Thread(target=run.worker, args=(name, number), daemon=True)
        for name in names
        if name != "soak"
        for number in range(KINDS[name].workers)
    ]
    if "soak" in names:
        threads.append(threading.Thread(target=run.soak, daemon=True))
    for thread in threads:
        thread.start()
    minute = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        if time.time() > run.start + 60 * (minute + 1) and time.time() < run.end:
            minute += 1
            for name, counts in list(run.counts.items()):
                done = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
                run.say(f"minute {minute:>3} {name}: {done}; {len(run.failures.get(name, []))} failures")
            for note in run.notes.values():
                run.say(f"minute {minute:>3} {note}")
    run.table()
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
