"""E10 for each backend of this machine: a million draws from a power law over 50257 tokens, chi-square.

python -m bench.exact_race [NUM_DRAWS] [RESULT.json]

The plain PyTorch backend is compiled, because its random numbers alone would take an hour eagerly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench.report import write
from bench.script import arguments
from loopmdm_kernels import calls
from loopmdm_kernels.reference.sample_rows import sample_logits
from loopmdm_kernels.testing import chi_square_p
from loopmdm_kernels.types import Head, RowRng

VOCAB = 50_257
SEED = 2
CHUNK = 2_000

Draw = Callable[[Tensor], Tensor]  # ids of n sequences -> one token for each


def power_law(exponent: float = 1.1) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Probabilities [V] proportional to rank^-exponent, in random order."""
    probs = np.arange(1, VOCAB + 1, dtype=np.float64) ** -exponent
    return np.random.default_rng(0).permutation(probs / probs.sum())


def drawer(backend: str, device: str, log_probs: Tensor) -> Draw:
    log_probs = log_probs.to(device)

    def names(sequences: Tensor) -> RowRng:
        zeros = torch.zeros_like(sequences)
        return RowRng(SEED, sequences, zeros, zeros)

    if backend == "reference":

        @torch.compile
        def plain(sequences: Tensor) -> Tensor:
            logits = log_probs.expand(len(sequences), -1)
            return sample_logits(logits, -1, calls.Draw(names(sequences))).token

        return plain
    one, nothing = torch.ones(2, device=device), torch.zeros(1, 1, 2, device=device)
    head = Head(one, torch.zeros(VOCAB, 2, device=device), log_probs, torch.zeros(1, 2, 2, device=device))

    def op(sequences: Tensor) -> Tensor:
        with lk.use_backend(backend):
            return lk.sample_rows(nothing, head, torch.zeros_like(sequences), names(sequences)).token

    return op


def measure(backend: str, device: str, num: int) -> dict[str, float]:
    """p-value of `num` draws, and the seconds they took."""
    probs = power_law()
    draw = drawer(backend, device, torch.from_numpy(np.log(probs)).float())
    counts = np.zeros(VOCAB, dtype=np.int64)
    start = time.perf_counter()
    for sequences in torch.arange(num, device=device).split(CHUNK):
        counts += np.bincount(draw(sequences).cpu().numpy(), minlength=VOCAB)
    return {"p_value": chi_square_p(counts, probs), "seconds": round(time.perf_counter() - start, 1)}


def main(draws: str = "1_000_000", result: str | None = None) -> None:
    num = int(draws)
    usable = {"cpu": "cpu", "reference": "cpu", "triton": "cuda", "cuda": "cuda"}
    states = lk.available_backends()
    if not torch.cuda.is_available():
        usable = {name: device for name, device in usable.items() if device == "cpu"}
    figures = {}
    for backend, device in usable.items():
        figures[backend] = measure(backend, device, num)
        print(f"{backend:<10} {states[backend]!s:<14} {figures[backend]}", flush=True)
    if result is not None:
        document = {
            "date": date.today().isoformat(),
            "command": f"python -m bench.exact_race {num}",
            "draws": num,
            "vocabulary": VOCAB,
            "versions": {"loopmdm_kernels": lk.__version__, "torch": torch.__version__},
            "backends": states,
            "figures": figures,
        }
        write(document, Path(result))


if __name__ == "__main__":
    main(*arguments(__doc__, "[num_draws]", "[result]"))
