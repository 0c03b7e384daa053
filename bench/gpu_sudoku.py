"""A whole call of the 9x9 Sudoku model on a GPU: the smallest network that is shipped, where waiting is all.

A phase of bench.gpu_hopper. Weights are random: the time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench.gpu import captured
from bench.probes.hopper_facts import Figures, Run
from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm_kernels.cuda import looped_blocks

LOOPS = 12
TARGET_SECONDS = 150e-6


def calling(model: LoopMDM, board: Tensor, *, blocks: str, logits: str) -> Callable[[], Tensor]:
    """Embedding, head, loop, tail and logits, with a backend for the blocks and one for the logits."""

    def call() -> Tensor:
        with lk.use_backend(blocks):
            hidden = model.hidden(board, num_loops=LOOPS)
        with lk.use_backend(logits):
            out: Tensor = lk.head_logits(hidden, model.head(), compute_dtype=model.compute_dtype)
        return out

    return call


def without_cluster(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """What `make` makes if the blocks are those of the whole GPU."""
    assumed = looped_blocks.device_of
    looped_blocks.device_of = lambda *given: assumed(*given)._replace(cluster=1)  # type: ignore[assignment]
    looped_blocks._kernel.cache_clear()
    try:
        return make()
    finally:
        looped_blocks.device_of = assumed
        looped_blocks._kernel.cache_clear()


def whole_call(run: Run) -> Figures:
    """Seconds of a call: ours in a CUDA graph, in one cluster and not, and the reference in eager mode."""
    torch.manual_seed(0)
    model = LoopMDM(LoopMDMConfig.preset("sudoku")).to(run.device).eval()
    config = model.config
    board = torch.randint(0, config.vocab_size, (1, config.max_length), device=run.device)
    blocks, logits = ("reference", "reference") if run.dry else ("cuda", "triton")
    ours = partial(captured, calling(model, board, blocks=blocks, logits=logits), dry=run.dry)
    makers = {"cuda": ours, "cuda without cluster": partial(without_cluster, ours)}
    # Weights do not change between calls of a sampler, and what was cast in a graph is gone after it.
    casts = torch.autocast(board.device.type, torch.bfloat16, cache_enabled=False)
    with torch.no_grad(), casts, model.frozen():
        calls = {"reference, eager": calling(model, board, blocks="reference", logits="reference")}
        failed: Figures = {}
        for name, make in makers.items():
            try:
                calls[name] = make()
            except RuntimeError as error:
                failed[name] = str(error).splitlines()[0]
        return {**failed, **run.seconds(calls)}
