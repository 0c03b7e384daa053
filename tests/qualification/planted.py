"""A child of `qualify` in which a backend is broken, as PLANTED says; its tasks are those of the real one."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import torch

from loopmdm_kernels.cpu import attention
from loopmdm_kernels.qualification import child


def planted(run, fault, late=0):
    """late: calls before the fault of that name."""
    calls = itertools.count()

    def broken(call):
        number = next(calls)
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            if "PLANTED_MARK" in os.environ:
                Path(os.environ["PLANTED_MARK"]).touch()
            time.sleep(10_000)
        if fault == "error":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")
        if fault == "noise":
            print("a library says something", flush=True)
        out = run(call)
        if fault == "wrong":
            return out + 0.01
        if fault == "unwritten":
            return torch.cat((out[..., :-1], torch.empty_like(out[..., -1:])), dim=-1)
        if fault == "once":
            return out + 1e-6 * (number == 30)
        if fault == "late":
            return out + 1e-6 * (number >= late)
        if fault == "in threads":
            return out + 1e-6 * (threading.current_thread() is not threading.main_thread())
        return out

    return broken


if __name__ == "__main__":
    name = os.environ["PLANTED"]
    attention.run = planted(attention.run, name)
    child.main()
