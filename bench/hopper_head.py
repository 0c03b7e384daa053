"""The Hopper kernels of the vocabulary head beside Triton and torch; phases of bench.gpu_hopper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import loopmdm_kernels as lk
from bench.gpu import captured, compiled
from bench.gpu_cases import REAL, TINY, cross_entropy_calls, head_on, names_on, rows_on, sample_calls
from bench.probes.hopper_facts import Figures, Run

BACKENDS = ("cuda", "triton")


def _forced(backend: str, call: Callable[[], Any], run: Run) -> Callable[[], Any]:
    def forced() -> Any:
        with lk.use_backend("reference" if run.dry else backend):
            return call()

    return forced


def sample_rows(num_rows: int, run: Run) -> Figures:
    """Seconds of a draw for each row, in CUDA graphs. Few rows read the weight; many multiply by it."""
    sizes, device = (TINY, torch.device("cpu")) if run.dry else (REAL, torch.device("cuda"))
    rows = min(num_rows, sizes.sampled_rows[0]) if run.dry else num_rows
    hidden, head = head_on(device, sizes, 1, max(rows, 2), torch.bfloat16)
    peers = dict(sample_calls(hidden, head, rows, partial(compiled, dry=run.dry)))
    ours = peers.pop("ours")
    with torch.no_grad():
        calls = {name: captured(_forced(name, ours, run), dry=run.dry) for name in BACKENDS}
        calls.update({name: captured(call, dry=run.dry) for name, call in peers.items()})
        return run.seconds(calls)


def masked_cross_entropy(run: Run) -> Figures:
    """Seconds of the loss of every second of 16384 tokens and all its gradients."""
    sizes, device = (TINY, torch.device("cpu")) if run.dry else (REAL, torch.device("cuda"))
    hidden, head = head_on(device, sizes, *sizes.training, torch.bfloat16, grad=True)
    chosen = rows_on(device, sizes, *sizes.training)
    peers = dict(cross_entropy_calls(hidden, head, chosen, partial(compiled, dry=run.dry)))
    ours = peers.pop("ours")
    return run.seconds({**{name: _forced(name, ours, run) for name in BACKENDS}, **peers})


def once(run: Run) -> None:
    """Small cases of all kernels for a sanitizer: blocks of 64 rows and pairs of 128, chunks not whole."""
    sizes, device = TINY._replace(hidden=72, vocab_size=700), torch.device(run.device)
    for length in (40, 200):
        hidden, head = head_on(device, sizes, 2, length, torch.bfloat16, grad=True)
        targets, rows, weights = rows_on(device, sizes, 2, length)
        with lk.use_backend("reference" if run.dry else "cuda"):
            total, _ = lk.masked_cross_entropy(hidden, head, targets, rows, weights)
            torch.autograd.grad(total, [hidden, *head[:4]])
            with torch.no_grad():
                lk.head_logits(hidden, head)
                lk.sample_rows(hidden, head, rows, names_on(device, rows.shape[0]))
    if not run.dry:
        torch.cuda.synchronize()


PHASES = {
    **{f"sample_rows_R{rows}": partial(sample_rows, rows) for rows in REAL.sampled_rows},
    "masked_cross_entropy": masked_cross_entropy,
}
# Seconds, most of them of torch.compile for the peers.
EXPECTED = {**{f"sample_rows_R{rows}": 25.0 for rows in REAL.sampled_rows}, "masked_cross_entropy": 40.0}
