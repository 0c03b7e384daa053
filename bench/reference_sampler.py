"""MDLM's sampler (`ddpm_cache`) in plain PyTorch: what a step of sampling costs today."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LAST_TIME = 1e-5


def predict(logits: Tensor, mask_token_id: int) -> Tensor:
    """p(x0 | xt) [B, L, V] from logits, rounded as they are (SUBS)."""
    logits = logits.clone()
    logits[..., mask_token_id] = -1e6
    return (logits - logits.logsumexp(dim=-1, keepdim=True)).exp()


def update(tokens: Tensor, probs: Tensor, mask_token_id: int, t: float, s: float) -> Tensor:
    """One step from t to s: a race over the vocabulary and the mask at every position, in fp32."""
    chances = probs.float() * (t - s)
    chances[..., mask_token_id] = s
    drawn = (chances / (1e-10 - (torch.rand_like(chances) + 1e-10).log())).argmax(dim=-1)
    return torch.where(tokens == mask_token_id, drawn, tokens)


def run_steps(
    network: Callable[[Tensor], Tensor],
    tokens: Tensor,
    mask_token_id: int,
    num_steps: int,
    calls: tuple[int, ...] | None,
    total_steps: int,
    predict: Callable[..., Tensor] = predict,
    update: Callable[..., Tensor] = update,
) -> tuple[Tensor, int]:
    """The first num_steps of a run of total_steps: tokens [B, L] and the network calls made.

    A prediction is used again while no token of the batch has changed; `calls` names the steps that compute
    instead, so that runs to be compared compute equally often.
    """
    dt = (1 - LAST_TIME) / total_steps
    probs, made = None, 0
    for step in range(num_steps):
        t = 1 - step * dt
        if step in calls if calls is not None else probs is None:
            probs = predict(network(tokens), mask_token_id)
            made += 1
        assert probs is not None
        after = update(tokens, probs, mask_token_id, t, t - dt)
        if calls is None and not torch.allclose(after, tokens):
            probs = None
        tokens = after
    return tokens, made
