"""Sampling in `make gpu`: runs beside the reference's algorithm, single steps, and what a launch costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

import loopmdm_kernels as lk
from bench.gpu_cases import Calls, Sizes, apply_loops, looped_on
from bench.peers import EAGER, compiled_pieces, plain_ops
from bench.reference_sampler import run_steps
from loopmdm import LoopMDM, LoopMDMConfig, sample
from loopmdm_kernels.graphs import captured_by
from loopmdm_kernels.testing import RecordedGraphs, interleaved_medians

BF16 = torch.bfloat16


def model_on(device: torch.device, sizes: Sizes, length: int, *, dry: bool) -> LoopMDM:
    small = {"hidden_size": sizes.hidden, "num_heads": sizes.heads, "num_layers": 4} if dry else {}
    config = LoopMDMConfig.preset(
        "small", vocab_size=sizes.vocab_size, mask_token_id=sizes.vocab_size - 1, max_length=length, **small
    )
    torch.manual_seed(0)
    return LoopMDM(config).to(device, BF16).eval()


def our_calls(model: LoopMDM, sizes: Sizes, shape: tuple[int, int, int], order: str, *, dry: bool) -> Calls:
    """Runs of batch, length and steps, with and without CUDA graphs."""
    batch, length, steps = shape
    run = partial(sample, model, batch, length, steps, order=order, plan=sizes.loops, progress=False, seed=0)

    def graphs() -> Any:
        with captured_by(RecordedGraphs()) if dry else nullcontext():
            return run(cuda_graphs=True)

    return {"ours": run, "ours, graphs": graphs}


def sampling_calls(device: torch.device, sizes: Sizes, *, dry: bool) -> Calls:
    """A whole sampling run, and the reference's algorithm with the compiled pieces of the same model."""
    batch, length, steps = sizes.sampling
    model = model_on(device, sizes, length, dry=dry)
    mask = model.config.mask_token_id
    functions = EAGER if dry else compiled_pieces()
    start = torch.full((batch, length), mask, device=device)

    @torch.no_grad()
    def reference_run() -> Any:
        with plain_ops(functions):
            network = partial(model, num_loops=sizes.loops)
            return run_steps(network, start, mask, steps, None, steps)

    calls = our_calls(model, sizes, sizes.sampling, "ancestral", dry=dry)
    return {**calls, "reference algorithm": reference_run}


def step_times(device: torch.device, sizes: Sizes, *, dry: bool) -> dict[str, Any]:
    """A denoising step of few tokens, in ms; the captures of the run are part of it."""
    _, length, steps = sizes.step
    model = model_on(device, sizes, length, dry=dry)
    calls = our_calls(model, sizes, sizes.step, "random", dry=dry)
    with lk.use_backend("triton"):
        medians = interleaved_medians(calls, repeats=sizes.repeats, warmup=0 if dry else 1)
    return {"ms a step": {name: round(1000 * value / steps, 4) for name, value in medians.items()}}


def launch_overhead(device: torch.device, sizes: Sizes, *, dry: bool) -> dict[str, Any]:
    """What the host needs for a launch outside a graph: looped_blocks of few tokens, not waited for."""
    from loopmdm_kernels.triton.launch import processor, recording

    inputs = looped_on(device, sizes, *sizes.forward[0], BF16)
    call: Callable[[], Any] = partial(apply_loops, lk.looped_blocks, inputs, sizes.loops)
    wait = (lambda: None) if dry else torch.cuda.synchronize
    times = []
    with torch.no_grad(), lk.use_backend("triton"):
        with recording(processor(device)) as launches:
            call()
        for _ in range(1 + sizes.repeats):
            wait()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    wait()
    host = statistics.median(times[1:])
    return {"launches a call": len(launches), "us a launch": round(1e6 * host / len(launches), 2)}
