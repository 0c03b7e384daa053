"""Tasks in child processes: one that crashes, fails or takes too long costs its own answer and no other."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

COMMAND: Sequence[str] = (sys.executable, "-m", "loopmdm_kernels.qualification.child")
STARTING_SECONDS = 180.0  # importing torch from a slow disk, and a context on the device
_ENDING_SECONDS = 60.0
_PACKAGES = str(Path(__file__).resolve().parents[2])  # the same package, however this process found it
_FORCES = ("LOOPMDM_BACKEND", "LOOPMDM_CPU_ISA", "TRITON_INTERPRET")

Task = dict[str, Any]
Finding = dict[str, Any]


def answers(
    tasks: Sequence[Task], device: str, seconds: float, began: Callable[[Task], object]
) -> Iterator[tuple[Task, Finding]]:
    """(task, finding) in the order of `tasks`; {"error": ...} of one that ended its process or was stopped.

    seconds: how long a task may take, on a machine that does nothing else.

    Raises:
        RuntimeError: a process does not even start.
    """
    left = list(tasks)
    while left:
        done = 0
        with _Child({"device": device, "tasks": left, "threads": torch.get_num_threads()}) as child:
            said = child.next(STARTING_SECONDS)
            if said.get("event") != "ready":
                raise RuntimeError(
                    f"qualify: the process that tries the kernels does not start: {said['error']}"
                )
            while done < len(left):
                said = child.next(seconds)
                if said.get("event") == "begin":
                    began(left[done])
                    continue
                finding = said["finding"] if "finding" in said else {"error": said["error"]}
                yield left[done], finding
                done += 1
                if "error" in finding:
                    break
        left = left[done:]


def _clock(pid: int) -> float:
    """Seconds that go by, but for those in which a process waits for a processor that others use.

    On a busy machine what is right would be taken for what hangs. Of its threads the one counts that has
    waited longest; where the system does not say it, all time counts.
    """
    waited = [0]
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError, IndexError):
                waited.append(int((thread / "schedstat").read_text().split()[1]))
    return time.monotonic() - max(waited) / 1e9


class _Child:
    """A process, and what it says."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _FORCES}
        environment |= {
            "LOOPMDM_QUALIFY": "0",
            "PYTHONSAFEPATH": "1",  # no module of the folder that a user is in
            "PYTHONPATH": os.pathsep.join(filter(None, (_PACKAGES, os.environ.get("PYTHONPATH")))),
        }
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed at the end of `with`)
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            start_new_session=True,  # so that its own children end with it
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: `next` says so
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()

    def next(self, seconds: float) -> dict[str, Any]:
        """What it says next, or {"error": ...} if it ends or says nothing for so long."""
        pid = self._process.pid
        start, left = _clock(pid), seconds
        while left > 0:
            try:
                line = self._lines.get(timeout=left)
                break
            except queue.Empty:
                left = seconds - (_clock(pid) - start)
        else:
            return {"error": f"did not end within {seconds:g} s"}
        if line is None:
            return {"error": self._how_it_ended()}
        said: dict[str, Any] = json.loads(line)
        return said

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to what hangs on a GPU
            self._process.wait(_ENDING_SECONDS)
        self._reader.join(_ENDING_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{how}: {said[-1][:300]}" if said else how
