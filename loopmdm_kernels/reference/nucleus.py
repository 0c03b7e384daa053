"""Draws from the most probable tokens of a row: top-k and nucleus sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.calls import Draw
from loopmdm_kernels.philox import race_times_of

_LIKELY_TOKENS = 1024  # a nucleus is seldom larger, and sorting so many is cheap


def restriction(log_probs: Tensor, temperature: float, top_p: float, top_k: int | None) -> Tensor:
    """Boolean [R, V]: the tokens to draw from softmax(log_probs / temperature), the lowest ids on ties.

    They are the top_k most probable, and of these, renormalised, the smallest set that reaches top_p.
    """
    most = log_probs.shape[-1] if top_k is None else min(top_k, log_probs.shape[-1])
    if top_p == 1.0:
        return _most_probable(log_probs, log_probs.topk(most, dim=-1).values, torch.tensor(most))
    tempered = torch.log_softmax(log_probs / temperature, dim=-1)
    if top_k is not None:
        tempered = tempered - tempered.topk(most, dim=-1).values.logsumexp(dim=-1, keepdim=True)
    # In the order of log_probs: at a high temperature fp32 does not tell the tempered ones apart.
    best, tokens = log_probs.topk(min(most, _LIKELY_TOKENS), dim=-1)
    count = _nucleus_size(tempered.gather(1, tokens), top_p)
    if best.shape[-1] < most and bool((count == best.shape[-1]).any()):
        best, tokens = log_probs.topk(most, dim=-1)
        count = _nucleus_size(tempered.gather(1, tokens), top_p)
    return _most_probable(log_probs, best, count)


def _nucleus_size(best: Tensor, top_p: float) -> Tensor:
    """How many of the sorted log-probabilities [R, n] it takes to reach top_p, in 1..n: [R]."""
    probs = best.exp()
    return (probs.cumsum(dim=-1) - probs < top_p).sum(dim=-1).clamp_min(1)


def _most_probable(values: Tensor, best: Tensor, count: Tensor) -> Tensor:
    """Boolean [R, V]: the `count` ([R] or one for all) largest of values [R, V]; best: these, sorted."""
    count = count.to(values.device).expand(values.shape[:1])[:, None]
    least = best.gather(1, count - 1)
    above, level = values > least, values == least
    left = count - above.sum(dim=-1, keepdim=True)
    return above | (level & (level.cumsum(dim=-1) <= left))


def draw_restricted(log_probs: Tensor, draw: Draw) -> Tensor:
    """Tokens [R] drawn from softmax(log_probs / temperature), restricted to the most probable.

    The winners of the exponential race among them, with the times of the full race.
    """
    return draw_among(log_probs, restriction(log_probs, *draw.limits), draw)


def draw_among(log_probs: Tensor, allowed: Tensor, draw: Draw) -> Tensor:
    """Tokens [R] drawn from softmax(log_probs / temperature) where `allowed` [R, V]: at least one a row."""
    rng = draw.rng
    row, token = allowed.nonzero(as_tuple=True)
    times = race_times_of(rng.seed, rng.sequence[row], rng.step[row], rng.position[row], token)
    scores = log_probs[row, token].double() / draw.temperature - times.log()
    best = torch.full(allowed.shape[:1], -torch.inf, dtype=torch.float64, device=allowed.device)
    best.scatter_reduce_(0, row, scores, "amax")
    winner = torch.full_like(best, allowed.shape[-1], dtype=torch.int64)
    wins = scores == best[row]
    return winner.scatter_reduce_(0, row[wins], token[wins], "amin").clamp_max(allowed.shape[-1] - 1)
