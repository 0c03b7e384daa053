"""What a model would predict after each number of loops, at states of a run that is over."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm.model import diffusion, vocabulary
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm.sampling import StepEvent
from loopmdm.view.replay import Replay


class LoopPredictions(NamedTuple):
    """The most probable token of every masked position, after 1, 2, .. S loops.

    Positions are those that are masked after `state` events, ordered by sequence, then position.
    """

    state: int
    tokens: Tensor  # [S, R] int64
    probabilities: Tensor  # [S, R]


@torch.inference_mode()
def predict_loops(
    model: Any,
    canvas: Tensor,
    history: Sequence[StepEvent],
    plan: ComputePlan,
    num_steps: int,
    *,
    most_states: int,
    dtype: torch.dtype | None = None,
) -> list[LoopPredictions]:
    """Run the network again on the canvases before `most_states` of the events, spread over the run.

    S is the model's max_loops, or what the plan spends on the step where that is more. Every sequence with
    masks costs S network calls a state. A model with time conditioning is told the share of the positions to
    fill that is still masked. Sequences longer than the model's max_length cannot be read whole: none.

    Args:
        model: the model that was sampled, or the plan's own where it has one at that step.
        canvas: [B, L], the tokens before the first step.
        history: `SampleResult.history`.
        plan, num_steps: of the run.
        most_states: at most this many events.
        dtype: as in `sample`.
    """
    if canvas.shape[1] > model.config.max_length:
        return []
    mask = model.config.mask_token_id
    replay = Replay(canvas, mask)
    chosen = _spread(len(history), most_states)
    to_fill = replay.masked.sum(dim=1)
    predictions = []
    with torch.autocast(model.device.type, dtype) if dtype is not None else nullcontext():
        for state, event in enumerate(history):
            if state in chosen:
                compute = _compute_at(plan, event.step, num_steps, replay.masked.sum() / to_fill.sum())
                network = model if compute.model is None else compute.model
                loops = max(compute.num_loops or 1, network.config.max_loops)
                parts = [
                    _predict(network, _unpadded(replay.tokens[index]), loops, mask, int(to_fill[index]))
                    for index in replay.masked.any(dim=1).nonzero().flatten().tolist()
                ]
                tokens, probabilities = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
                predictions.append(LoopPredictions(state, tokens, probabilities))
            replay.apply(event)
    return predictions


def _compute_at(plan: ComputePlan, step: int, num_steps: int, share: Tensor) -> StepCompute:
    """The plan's entry for a step; a plan of another number of steps was read by the share still masked."""
    if plan.reading == "step" and plan.num_steps in (None, num_steps):
        return plan.at(step, num_steps)
    return plan.at_time(float(share))


def _unpadded(row: Tensor) -> Tensor:
    return row[row >= 0]


def _predict(model: Any, row: Tensor, loops: int, mask: int, to_fill: int) -> tuple[Tensor, Tensor]:
    """Tokens and probabilities [S, R] for one sequence [L]: a batch of its S loop counts."""
    device = model.device
    positions = (row == mask).nonzero().squeeze(1)
    time = torch.full((loops,), positions.numel() / to_fill, dtype=torch.float64)
    sigma = diffusion.sigma(time).float().to(device) if model.config.time_conditioning else None
    hidden = model.hidden(
        row.expand(loops, -1).contiguous().to(device),
        sigma,
        num_loops=torch.arange(1, loops + 1, device=device),
    )
    rows = (torch.arange(loops)[:, None] * row.numel() + positions).flatten().to(device)
    found = vocabulary.most_probable(hidden, model.head(sigma), rows, compute_dtype=model.compute_dtype)
    shape = (loops, positions.numel())
    return found.top1_token.cpu().view(shape), found.top1_prob.float().cpu().view(shape)


def _spread(count: int, most: int) -> set[int]:
    """At most `most` of 0..count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return set(range(count))
    if most <= 1:
        return set(range(most))
    return {round(i * (count - 1) / (most - 1)) for i in range(most)}
