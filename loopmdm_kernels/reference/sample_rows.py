"""One categorical draw per selected row by an exponential race, with the statistics of the row.

argmin_v E_v / p_v with independent standard exponentials E is an exact draw from p. The winner of
logit_v / temperature - log E_v is the same token, so nothing has to be normalised first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from loopmdm_kernels.calls import Draw, SampleCall
from loopmdm_kernels.philox import race_times
from loopmdm_kernels.reference.head_logits import row_logits, subs_log_probs
from loopmdm_kernels.reference.nucleus import draw_restricted
from loopmdm_kernels.types import SampledRows


def _first_argmax(scores: Tensor) -> Tensor:
    """Index of the maximum of each row, the lowest one on ties (torch.argmax promises no order)."""
    best = scores.amax(dim=-1, keepdim=True)
    index = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    return torch.where(scores == best, index, scores.shape[-1]).amin(dim=-1)


def run(call: SampleCall) -> SampledRows:
    return sample_logits(row_logits(call, call.rows), call.head.excluded_token, call.draw)


def sample_logits(
    logits: Tensor,
    excluded_token: int,
    how: Draw,
    draw: Callable[[Tensor, Draw], Tensor] = draw_restricted,
) -> SampledRows:
    """One draw for each row of logits [R, V], and the statistics of the row.

    draw: how a backend draws where top_p or top_k restrict; the tokens are those of `draw_restricted`.
    """
    log_probs = subs_log_probs(logits, excluded_token)
    vocab_size = logits.shape[-1]
    top1_token = _first_argmax(log_probs).clamp_max(vocab_size - 1)
    if how.temperature == 0:
        token = top1_token
    elif how.restricted:
        token = draw(log_probs, how)
    else:
        scores = logits / how.temperature - race_times(*how.rng, vocab_size, logits.dtype).log()
        scores = scores.masked_fill(log_probs == -math.inf, -math.inf)
        token = _first_argmax(scores).clamp_max(vocab_size - 1)
    probs = log_probs.exp()
    top = probs.topk(min(2, vocab_size), dim=-1).values
    plogp = torch.where(probs == 0, torch.zeros_like(probs), probs * log_probs)  # NaN stays
    return SampledRows(
        token=token,
        log_prob=log_probs.gather(1, token[:, None]).squeeze(1),
        top1_token=top1_token,
        top1_prob=top[:, 0],
        top2_prob=top[:, 1] if vocab_size > 1 else torch.zeros_like(top[:, 0]),
        entropy=-plogp.sum(dim=-1),
    )


def sample_in_parts(
    call: SampleCall,
    rows: int,
    logits: Callable[[slice], Tensor],
    draw: Callable[[Tensor, Draw], Tensor] = draw_restricted,
) -> SampledRows:
    """`sample_logits` of so many rows at a time, whose logits [., V] are made for it."""
    slices = [slice(first, first + rows) for first in range(0, max(call.rows.shape[0], 1), rows)]
    parts = [
        sample_logits(logits(part), call.head.excluded_token, call.draw.of_rows(part), draw)
        for part in slices
    ]
    return SampledRows(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
