"""One categorical draw per selected row by an exponential race, with the statistics of the row.

argmin_v E_v / p_v with independent standard exponentials E is an exact draw from p. The winner of
logit_v / temperature - log E_v is the same token, so nothing has to be normalised first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from loopmdm_kernels.philox import race_times
from loopmdm_kernels.reference.head_logits import row_logits, subs_log_probs
from loopmdm_kernels.reference.nucleus import draw_restricted
from loopmdm_kernels.types import Head, RowRng, SampledRows


def _first_argmax(scores: Tensor) -> Tensor:
    """Index of the maximum of each row, the lowest one on ties (torch.argmax promises no order)."""
    best = scores.amax(dim=-1, keepdim=True)
    index = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    return torch.where(scores == best, index, scores.shape[-1]).amin(dim=-1)


def sample_rows(
    hidden: Tensor,
    head: Head,
    rows: Tensor,
    rng: RowRng,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SampledRows:
    logits = row_logits(hidden, head, rows, compute_dtype)
    return sample_logits(logits, head.excluded_token, rng, temperature=temperature, top_p=top_p, top_k=top_k)


def sample_logits(
    logits: Tensor,
    excluded_token: int,
    rng: RowRng,
    *,
    temperature: float,
    top_p: float,
    top_k: int | None,
    draw: Callable[[Tensor, float, float, int | None, RowRng], Tensor] = draw_restricted,
) -> SampledRows:
    """One draw for each row of logits [R, V], and the statistics of the row.

    draw: how a backend draws where top_p or top_k restrict; the tokens are those of `draw_restricted`.
    """
    log_probs = subs_log_probs(logits, excluded_token)
    vocab_size = logits.shape[-1]
    top1_token = _first_argmax(log_probs).clamp_max(vocab_size - 1)
    if temperature == 0:
        token = top1_token
    elif top_p < 1.0 or top_k is not None:
        token = draw(log_probs, temperature, top_p, top_k, rng)
    else:
        times = race_times(rng.seed, rng.sequence, rng.step, rng.position, vocab_size, logits.dtype)
        scores = logits / temperature - times.log()
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
