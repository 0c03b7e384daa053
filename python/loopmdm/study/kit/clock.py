"""Whether what a plan saves in the ledger is saved on the clock."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from loopmdm.model import LoopMDM
from loopmdm.model.flops import DEFAULT_CONVENTION
from loopmdm.plan import ComputePlan
from loopmdm.sampling import Decoding
from loopmdm.sampling.sampler import sample_with
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.kit.sources import HeldOut


def clock(
    folder: StudyFolder,
    model: LoopMDM,
    data: HeldOut,
    plans: Mapping[str, ComputePlan],
    base: str,
    *,
    repeats: int,
    steps: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What each plan saves against the plan named `base`, in executed FLOPs and in seconds.

    One batch of the data is sampled under every plan in turn, `repeats` times. The saving on the clock is the
    median over the turns, so a machine that is busy for a while disturbs it little.

    Args:
        steps: denoising steps; puzzles are filled from left to right, a cell a step.
    """
    warm = False

    def run(key: str) -> dict[str, Any]:
        nonlocal warm
        if not warm:  # packed weights and the like
            _sample(model, data, plans[base], steps, seed)
            warm = True
        return _sample(model, data, plans[key.rpartition(" #")[0]], steps, seed)

    turns = [
        dict(zip(plans, folder.items([f"{name} #{turn}" for name in plans], run, "timed runs"), strict=True))
        for turn in range(repeats)
    ]
    return {
        name: {
            "clock_saved": 1
            - statistics.median(turn[name]["seconds"] / turn[base]["seconds"] for turn in turns),
            "ledger_saved": 1 - turns[0][name]["flops"] / turns[0][base]["flops"],
            "run_mean_loops": turns[0][name]["mean_loops"],
            "run_network_calls": turns[0][name]["network_calls"],
            "run_seconds": statistics.median(turn[name]["seconds"] for turn in turns),
        }
        for name in plans
    }


def _sample(model: LoopMDM, data: HeldOut, plan: ComputePlan, steps: int, seed: int) -> dict[str, Any]:
    batch = data.batches[0]
    if not data.puzzles:
        decoding = Decoding(steps=steps, plan=plan, seed=seed)
        result = sample_with(model, decoding, *batch.input_ids.shape, progress=False)
    else:
        assert batch.prompt_mask is not None
        puzzles = torch.where(batch.prompt_mask, batch.input_ids, model.config.mask_token_id)
        decoding = Decoding(order="left_to_right", plan=plan, temperature=0.0)
        result = sample_with(model, decoding, infill=puzzles, progress=False)
    return {
        "seconds": result.seconds,
        "flops": result.ledger.flops(DEFAULT_CONVENTION),
        "mean_loops": result.ledger.mean_loops,
        "network_calls": result.total_network_calls,
    }
