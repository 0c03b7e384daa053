"""A child of `qualify` in which a backend is broken, as PLANTED says; its tasks are those of the real one."""

import os
import signal
import time

import torch

from loopmdm_kernels.cpu import attention, sample_rows
from loopmdm_kernels.qualification import child

TIMES = {"calls": 0}


def planted(run, fault):
    def broken(call):
        TIMES["calls"] += 1
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            time.sleep(1000)
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
            return out + 1e-6 * (TIMES["calls"] == 31)
        return out

    return broken


if __name__ == "__main__":
    name = os.environ["PLANTED"]
    attention.run = planted(attention.run, name)
    if name == "token":
        draw = sample_rows.run

        def drawn(call):
            out = draw(call)
            return out._replace(token=(out.token + 1) % call.vocab_size)

        sample_rows.run = drawn
    child.main()
