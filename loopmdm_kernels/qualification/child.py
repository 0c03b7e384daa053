"""The process that does tasks of `qualify`, one after the other, and says of each when it begins and ends.

It reads one line of JSON, {"device": ..., "threads": ..., "tasks": [...]}, and writes a line at each step. It
ends after a task that failed, since an error may have left the device unusable, and when the process that
started it ends: the system sees to it, since a call that hangs may keep every thread of Python waiting.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import warnings
from typing import Any, TextIO

import torch

from loopmdm_kernels.qualification.checks import check
from loopmdm_kernels.qualification.races import compiled_race, race

_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def main() -> None:
    with contextlib.suppress(AttributeError, OSError):  # Linux has it; elsewhere the thread below is all
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    say = _own_output()
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked["threads"])
    device = torch.device(asked["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _say(say, {"event": "ready"})
    for index, task in enumerate(asked["tasks"]):
        _say(say, {"event": "begin", "index": index})
        finding = _done(task, device)
        _say(say, {"event": "end", "index": index, "finding": finding})
        if "error" in finding:
            break
    say.flush()
    os._exit(0)  # nothing that a kernel has broken may keep it


def _done(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    question = task["op"], task["direction"], getattr(torch, task["dtype"]), device
    try:
        if task["kind"] == "check":
            finding = check(task["backend"], *question)
        elif task["kind"] == "race":
            finding = race(task["backends"], *question)
        else:
            finding = {"seconds": compiled_race(*question)}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        said = str(error).strip().splitlines() or ["no message"]
        return {"error": f"{type(error).__name__}: {said[0]}"}
    return finding


def _own_output() -> TextIO:
    """Standard output for the lines of this module alone; what else is printed goes to standard error."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def _say(output: TextIO, event: dict[str, Any]) -> None:
    output.write(json.dumps(event) + "\n")
    output.flush()


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
