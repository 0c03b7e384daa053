"""Weighted cross-entropy of the masked rows: sum_r w_r * -log p(x0_r | xt) (MDLM, continuous-time NELBO)."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.reference.head_logits import row_logits, subs_log_probs
from loopmdm_kernels.types import Head


def masked_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    log_probs = subs_log_probs(row_logits(hidden, head, rows, compute_dtype), head.excluded_token)
    nll = -log_probs.gather(1, targets.flatten()[rows][:, None]).squeeze(1)
    return (nll * row_weights.to(nll.dtype)).sum(), nll
