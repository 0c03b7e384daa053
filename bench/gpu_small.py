"""Calls for a profiler or a sanitizer, which wants few and small ones.

python -m bench.gpu_small triton    every Triton kernel, on tensors of odd sizes
python -m bench.gpu_small cuda      every CUDA kernel
python -m bench.gpu_small once S    looped_blocks by CUDA with S loops, 128 tokens of the small model
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

import loopmdm_kernels as lk
from bench.gpu_checks import backend_of
from bench.looped_blocks import applied
from bench.phases import ROOT
from bench.run import BF16, REAL, TINY, Figures, Run, head_in_fp8, in_fp8
from bench.script import arguments
from loopmdm_kernels.cuda import looped_blocks as blocks
from loopmdm_kernels.cuda import targets


def on_triton(run: Run) -> None:
    batch, length = 2, 5
    run = run._replace(other_sizes=TINY)
    with lk.use_backend("triton"):
        inputs = run.looped(batch, length, grad=True)
        applied(lk.looped_blocks, inputs, 2, recompute=True).sum().backward()
        applied(lk.looped_blocks, inputs, 1, dropout=0.1).sum().backward()
        with torch.no_grad():
            applied(lk.looped_blocks, inputs, 2, exit_threshold=0.5)
        hidden, head = run.head(batch, length, grad=True)
        targets, rows, weights = run.rows(batch, length)
        lk.masked_cross_entropy(hidden, head, targets, rows, weights)[0].backward()
        with torch.no_grad():
            lk.sample_rows(hidden, head, rows, run.names(rows.shape[0]))
            lk.sample_rows(hidden, head, rows, run.names(rows.shape[0]), top_k=3)
            lk.head_logits(hidden, head)
            applied(lk.looped_blocks, in_fp8(inputs), 2, compute_dtype=BF16)
            lk.head_logits(hidden, head_in_fp8(head), compute_dtype=BF16)
        mask = torch.ones(batch, length, dtype=torch.bool, device=run.device)
        mask[0, 1] = False
        q = torch.randn(batch, 2, length, 24, device=run.device, requires_grad=True)
        lk.attention(q, q, q, key_mask=mask).sum().backward()
    run.synchronize()


def on_cuda(run: Run) -> None:
    """Of looped_blocks the kernel of this GPU and that of older ones; on Hopper those of the head.

    Blocks of 64 rows and pairs of 128, chunks that are not whole.
    """
    capability = (9, 0) if run.dry else torch.cuda.get_device_capability()
    own = targets.target_of(capability)
    older = targets.SM80._replace(architecture="sm_{}{}".format(*capability))
    for target in {own, older}:
        blocks.target_of = lambda capability, target=target: target  # type: ignore[assignment]
        with torch.no_grad():
            looped(run._replace(other_sizes=TINY._replace(hidden=128, heads=2)), 70, 2)
    blocks.target_of = targets.target_of
    run = run._replace(other_sizes=TINY._replace(hidden=72, vocab_size=700))
    for length in (40, 200) if own is targets.SM90 else ():
        hidden, head = run.head(2, length, grad=True)
        chosen = run.rows(2, length)
        with lk.use_backend(backend_of(run, "cuda")):
            total, _ = lk.masked_cross_entropy(hidden, head, *chosen)
            torch.autograd.grad(total, [hidden, *head[:4]])
            with torch.no_grad():
                lk.head_logits(hidden, head)
                lk.sample_rows(hidden, head, chosen[1], run.names(chosen[1].shape[0]))
    run.synchronize()


def looped(run: Run, length: int, loops: int) -> None:
    with torch.no_grad(), lk.use_backend(backend_of(run, "cuda")):
        applied(lk.looped_blocks, run.looped(1, length), loops)
    run.synchronize()


CALLS = {"triton": on_triton, "cuda": on_cuda}


def memcheck(name: str, run: Run) -> Figures:
    """compute-sanitizer's word on the small calls; where it is not installed they run without it."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if run.dry or program is None:
        CALLS[name](run)
        return {"memcheck": None if run.dry else "compute-sanitizer is not installed; the calls ran"}
    command = [
        program,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "1",
        sys.executable,
        "-m",
        "bench.gpu_small",
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*command, name], env=environment, cwd=ROOT, check=False)
    return {"memcheck": "right" if not done.returncode else f"wrong: status {done.returncode}, see the log"}


def main(name: str, loops: str = "1") -> None:
    run = Run(dry=False)
    if name == "once":
        looped(run._replace(other_sizes=REAL), 128, int(loops))
    else:
        CALLS[name](run)


if __name__ == "__main__":
    main(*arguments(__doc__, "calls", "[loops]"))
