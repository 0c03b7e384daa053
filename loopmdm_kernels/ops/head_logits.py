"""Logits at every position, for callers that want them; training and sampling never do."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.ops import checks
from loopmdm_kernels.reference.head import row_logits
from loopmdm_kernels.types import Head


def head_logits(hidden: Tensor, head: Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Logits [B, L, V] in the compute dtype, the excluded token's included.

    Args:
        hidden: [B, L, D] float32 or float64, the residual stream before the final norm.
        head: final norm, modulation and vocabulary projection.
        compute_dtype: dtype of the projection's operands and of the result; None: that of `head.weight`.
    """
    checks.tensor("hidden", hidden, dtypes=checks.STREAM_FLOATS, shape=("B", "L", "D"))
    checks.not_empty("hidden", hidden)
    batch, length, hidden_size = hidden.shape
    checks.head(head, hidden_size, batch, hidden.device)
    checks.compute_dtype(compute_dtype)
    rows = torch.arange(batch * length, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = row_logits(hidden, head, rows, compute_dtype)
    return logits.to(compute_dtype or head.weight.dtype).view(batch, length, -1)
