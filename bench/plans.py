"""Adaptive plans against the cap: what the ledger says is saved, and what the clock says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loopmdm import ComputePlan, sample
from loopmdm.runs.boards import held_out_puzzles
from loopmdm.runs.models import SHIPPED, load_model
from loopmdm_kernels.testing import interleaved_medians

BATCH, REPEATS = 16, 5


@pytest.mark.parametrize("eps", [0.2, 0.3])
@pytest.mark.parametrize("name", SHIPPED)
def test_adaptive_saving_reaches_the_clock(benchmark, name, eps):
    """Puzzles solved most confident cell first; saved shares are of the cap's FLOPs (blocks) and seconds."""
    model, spec = load_model(name, torch.device("cpu")), SHIPPED[name]
    clues = held_out_puzzles(spec, BATCH).clues
    canvas = torch.from_numpy(np.where(clues == 0, spec.mask_token_id, clues.astype(np.int64) - 1))
    cap = model.config.max_loops
    plans = {
        "cap": ComputePlan.constant(cap),
        "adaptive": ComputePlan.adaptive(eps, cap),
        "one loop": ComputePlan.constant(1),
    }
    ledgers: dict[str, Any] = {}

    def solve(kind: str) -> None:
        result = sample(
            model, infill=canvas, order="confidence", temperature=0.0, plan=plans[kind], progress=False
        )
        ledgers[kind] = result.ledger

    runs = {kind: (lambda kind=kind: solve(kind)) for kind in plans}
    seconds = interleaved_medians(runs, repeats=REPEATS, warmup=1)
    flops_saved, time_saved = (
        {kind: 1 - of[kind] / of["cap"] for kind in ("adaptive", "one loop")}
        for of in ({kind: ledger.flops("blocks") for kind, ledger in ledgers.items()}, seconds)
    )
    benchmark.extra_info.update(
        seconds={kind: round(value, 4) for kind, value in seconds.items()},
        mean_loops=round(ledgers["adaptive"].mean_loops, 2),
        flops_saved={kind: round(share, 3) for kind, share in flops_saved.items()},
        time_saved={kind: round(share, 3) for kind, share in time_saved.items()},
        reaches_the_clock={kind: round(time_saved[kind] / share, 3) for kind, share in flops_saved.items()},
        threads=torch.get_num_threads(),
    )
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    assert ledgers["adaptive"].mean_loops < cap
