"""What samples are worth at several loop counts: text under a scorer, Sudoku boards solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loopmdm.data.sudoku import SudokuSpec
from loopmdm.plan import as_plan
from loopmdm.quality import Scorer, generative_perplexity, unigram_entropy
from loopmdm.quality.bootstrap import Bootstrap
from loopmdm.runs.boards import ORDERS, held_out_puzzles
from loopmdm.sampling import Decoding
from loopmdm.sampling.sampler import sample_with
from loopmdm.solve import solve_puzzles
from loopmdm.study.kit.folder import Row, StudyFolder
from loopmdm.study.kit.sources import Denoiser


def text_rows(
    folder: StudyFolder,
    denoiser: Denoiser,
    scorer: Scorer | None,
    loops: Sequence[int],
    steps: Sequence[int],
    num: int,
    length: int,
    seed: int,
) -> list[Row]:
    """Ancestral samples for every number of steps and loops: entropy, and perplexity where there is a scorer.

    Sequence i draws the same random numbers in every row, so rows are paired.
    """

    def measure(key: str) -> dict[str, Any]:
        num_steps, num_loops = (int(word) for word in key.split()[1::2])
        decoding = Decoding(steps=num_steps, plan=as_plan(num_loops), seed=seed)
        result = sample_with(denoiser.model, decoding, num, length, progress=False)
        tokens = result.tokens.cpu()
        values: dict[str, Any] = {"entropy": unigram_entropy(tokens).tolist()}
        if scorer is not None:
            values["log_perplexity"] = generative_perplexity(scorer, tokens).per_sample.tolist()
        return values | {
            "network_calls": result.total_network_calls,
            "loops": int(result.loops.sum()),
            "flops": result.ledger.report()["flops"],
        }

    keys = [f"steps {t} loops {s}" for t in steps for s in loops]
    bootstrap = Bootstrap(num, seed=seed)
    rows = []
    for key, values in zip(keys, folder.items(keys, measure, "samples"), strict=True):
        num_steps, num_loops = (int(word) for word in key.split()[1::2])
        row: Row = {"part": "samples", "steps": num_steps, "num_loops": num_loops, "samples": num}
        estimates = {"entropy": bootstrap.mean(values["entropy"])}
        if scorer is not None:
            estimates["perplexity"] = bootstrap.function(values["log_perplexity"], np.exp)
        for name, estimate in estimates.items():
            for end, value in zip(("", "_low", "_high"), estimate, strict=True):
                row[name + end] = float(value)
        row |= {"network_calls": values["network_calls"], "loops_run": values["loops"]}
        rows.append(row | {f"flops ({name})": value for name, value in values["flops"].items()})
    folder.facts |= {
        "scorer": None if scorer is None else scorer.name,
        "sampler": "ancestral, temperature 1, exact race in fp32 with 64 random bits, last step samples",
    }
    return rows


def board_rows(
    folder: StudyFolder, denoiser: Denoiser, spec: SudokuSpec, loops: Sequence[int], num: int, seed: int
) -> list[Row]:
    """Shares of held-out puzzles solved, one cell a step, left to right and by confidence."""
    puzzles = held_out_puzzles(spec, num).clues

    def measure(key: str) -> dict[str, Any]:
        order, num_loops = key.split()
        result = solve_puzzles(denoiser.model, puzzles, spec, num_loops=int(num_loops), order=order)
        return {
            "solved": result.solved.tolist(),
            "network_calls": int(result.network_calls.sum()),
            "loops": int(result.loops.sum()),
        }

    keys = [f"{order} {s}" for order in ORDERS for s in loops]
    bootstrap = Bootstrap(num, seed=seed)
    rows = []
    for key, values in zip(keys, folder.items(keys, measure, "boards"), strict=True):
        order, num_loops = key.split()
        estimate = bootstrap.mean(values["solved"])
        row: Row = {"part": "boards", "order": order, "num_loops": int(num_loops), "boards": num}
        for end, value in zip(("", "_low", "_high"), estimate, strict=True):
            row[f"solved{end}"] = float(value)
        rows.append(row | {"network_calls": values["network_calls"], "loops_run": values["loops"]})
    folder.facts["sampler"] = "one cell a step, most probable digit"
    return rows
