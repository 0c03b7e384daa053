"""The forward process and its weights: MDLM's log-linear schedule in continuous time.

Noise eps = 1e-3: a token is masked with probability (1 - eps) t, the NELBO weight is exactly 1/t
(dsigma / expm1(sigma), eps cancels), and t lies in [1e-3, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

NOISE_EPS = 1e-3
MIN_TIME = 1e-3


def mask_probability(t: Tensor) -> Tensor:
    """Probability that a token is masked at time t, 1 - alpha_t."""
    return (1.0 - NOISE_EPS) * t


def sigma(t: Tensor) -> Tensor:
    """Total noise -log(alpha_t), what a time-conditioned network is fed."""
    return -torch.log1p(-(1.0 - NOISE_EPS) * t)


def loss_weight(t: Tensor) -> Tensor:
    """Weight of a masked token's cross-entropy in the NELBO (MDLM, log-linear schedule)."""
    return 1.0 / t


def sample_t(num: int, generator: torch.Generator | None = None) -> Tensor:
    """Stratified times [num] in [MIN_TIME, 1): one independent uniform in each of `num` strata."""
    jitter = torch.rand(num, generator=generator, dtype=torch.float32)
    u = (jitter / num + torch.arange(num, dtype=torch.float32) / num) % 1
    return (1.0 - MIN_TIME) * u + MIN_TIME


def draw_mask(t: Tensor, frozen: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Which tokens are masked at times t [B]: boolean [B, L], never where `frozen` [B, L]."""
    uniform = torch.rand(frozen.shape, generator=generator, dtype=torch.float32).to(frozen.device)
    return (uniform < mask_probability(t).to(frozen.device)[:, None]) & ~frozen


def subs_log_probs(logits: Tensor, input_ids: Tensor, mask_token_id: int) -> Tensor:
    """log p(x0 | xt) [B, L, V] from raw logits under MDLM's SUBS parameterization.

    The mask has probability 0, rows of revealed tokens are one-hot. Normalised in fp32 or float64; training
    and sampling use the fused ops instead, which never build this tensor.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = torch.arange(logits.shape[-1], device=logits.device)
    log_probs = torch.log_softmax(wide.masked_fill(index == mask_token_id, -torch.inf), dim=-1)
    carried = torch.where(index == input_ids[..., None], 0.0, -torch.inf).to(wide.dtype)
    return torch.where((input_ids == mask_token_id)[..., None], log_probs, carried)
