"""A child of `qualify` in which attention of a backend is broken, as PLANTED says by direction and dtype; its
tasks are those of the real one."""

import ctypes
import itertools
import json
import os
import signal
import threading
from pathlib import Path

import torch

from loopmdm_kernels.cpu import attention
from loopmdm_kernels.qualification import child


def planted(run, fault, late=0):
    """late: calls before the fault of that name."""
    calls = itertools.count()

    def broken(call):
        number = next(calls)
        if fault == "crash" or (fault == "crash if large" and call.q.numel() > 2**15):
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            if "PLANTED_MARK" in os.environ:
                Path(os.environ["PLANTED_MARK"]).touch()
            ctypes.PyDLL(None).sleep(10_000)  # as a kernel that waits in vain: no thread of Python goes on
        if fault == "error":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")
        print("a library says something", flush=True)
        out = run(call)
        if fault == "wrong" or (fault == "wrong if large" and call.q.numel() > 2**16):
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
    faults = {
        question: planted(attention.run, fault) for question, fault in json.loads(os.environ["PLANTED"])
    }

    def run(call):
        question = "gradients" if call.trains else "forward", str(call.dtype).removeprefix("torch.")
        return faults[" ".join(question)](call)

    attention.run = run
    child.main()
