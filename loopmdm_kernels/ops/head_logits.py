"""Logits at every position, for callers that want them; training and sampling never do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loopmdm_kernels import backends, reference
from loopmdm_kernels.ops import checks
from loopmdm_kernels.tracing import traced, without_autocast
from loopmdm_kernels.types import Fp8Head, Head


def head_logits(hidden: Tensor, head: Head | Fp8Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Logits [B, L, V] in the compute dtype, the excluded token's included.

    Args:
        hidden: [B, L, D] float32 or float64, the residual stream before the final norm.
        head: final norm, modulation and vocabulary projection.
        compute_dtype: dtype of the projection's operands and of the result; None: that of `head.weight`,
            unless this is fp8.
    """
    checks.tensor("hidden", hidden, dtypes=checks.STREAM_FLOATS, shape=("B", "L", "D"))
    checks.not_empty("hidden", hidden)
    batch, _, hidden_size = hidden.shape
    checks.head(head, hidden_size, batch, hidden.device)
    checks.compute_dtype(compute_dtype)
    if isinstance(head, Fp8Head):
        checks.for_inference("head", compute_dtype, hidden=hidden)
    if traced(hidden):
        implementation: Callable[..., Tensor] = reference.head_logits
    else:
        implementation = backends.implementation(
            "head_logits",
            hidden.device,
            fp8_weights=isinstance(head, Fp8Head),
            hidden=hidden,
            head=head,
            compute_dtype=compute_dtype,
        )
    with without_autocast(hidden.device):
        return implementation(hidden, head, compute_dtype=compute_dtype)
