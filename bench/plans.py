"""Adaptive plans against the cap: what the ledger says is saved, and what the clock says."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from loopmdm import ComputePlan, sample
from loopmdm.runs.boards import held_out_puzzles
from loopmdm.runs.models import SHIPPED, load_model
from loopmdm.sampling import fused
from loopmdm_kernels.testing import interleaved_medians

CAP, REPEATS, FEW = "cap", 15, 4
BRIEF = {"compiled": "", "python": "_in_python"}  # how steps are taken, and the end of the figures' names


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", SHIPPED)
def test_adaptive_saving_reaches_the_clock(benchmark, name, batch):
    """Puzzles solved most confident cell first; saved shares are of the cap's FLOPs (blocks) and seconds.

    With steps in compiled code, as `sample` takes them, and with Python between the network calls.
    """
    model, spec = load_model(name, torch.device("cpu")), SHIPPED[name]
    clues = held_out_puzzles(spec, batch).clues
    canvas = torch.from_numpy(np.where(clues == 0, spec.mask_token_id, clues.astype(np.int64) - 1))
    cap = model.config.max_loops
    plans = {
        CAP: ComputePlan.constant(cap),
        "adaptive 0.2": ComputePlan.adaptive(0.2, cap),
        "adaptive 0.3": ComputePlan.adaptive(0.3, cap),
        "one loop": ComputePlan.constant(1),
    }
    results: dict[str, Any] = {}

    def solve(kind: str) -> None:
        results[kind] = sample(
            model, infill=canvas, order="confidence", temperature=0.0, plan=plans[kind], progress=False
        )

    def solve_in_python(kind: str) -> None:
        with patch.object(fused, "_can_fuse", lambda *_: False):
            solve(kind)

    ways = {"compiled": solve, "python": solve_in_python}
    runs = {(way, kind): (lambda w=way, k=kind: ways[w](k)) for way in ways for kind in plans}
    long = name == "sudoku9" and batch > 1  # seconds a round
    seconds = interleaved_medians(runs, repeats=FEW if long else REPEATS, warmup=1)
    flops = {kind: result.ledger.flops("blocks") for kind, result in results.items()}
    saved = [kind for kind in plans if kind != CAP]
    flops_saved = {kind: 1 - flops[kind] / flops[CAP] for kind in saved}
    benchmark.extra_info.update(
        steps=results[CAP].num_steps,
        mean_loops={kind: round(results[kind].ledger.mean_loops, 2) for kind in saved},
        flops_saved={kind: round(share, 3) for kind, share in flops_saved.items()},
        threads=torch.get_num_threads(),
    )
    for way, end in BRIEF.items():
        of_way = {kind: seconds[way, kind] for kind in plans}
        time_saved = {kind: 1 - of_way[kind] / of_way[CAP] for kind in saved}
        benchmark.extra_info.update(
            {
                f"seconds{end}": {kind: round(value, 5) for kind, value in of_way.items()},
                f"time_saved{end}": {kind: round(share, 3) for kind, share in time_saved.items()},
                f"reaches_the_clock{end}": {
                    kind: round(time_saved[kind] / share, 3) for kind, share in flops_saved.items()
                },
            }
        )
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    assert results["adaptive 0.2"].ledger.mean_loops < cap
