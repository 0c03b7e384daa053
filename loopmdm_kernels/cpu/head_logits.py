"""`head_logits` on the CPU: float32 or bfloat16 operands, float32 sums, rounded once; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.cpu.head import head_arguments, why_not
from loopmdm_kernels.types import Head


def supports(*, hidden: Tensor, head: Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    tensors = (hidden, head.norm, head.weight, head.bias, head.modulation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no gradients"
    return why_not(hidden, head, compute_dtype)


def head_logits(hidden: Tensor, head: Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    from loopmdm_kernels import _C

    dtype = compute_dtype or head.weight.dtype
    batch, length, _ = hidden.shape
    rows = torch.arange(batch * length)
    logits = torch.empty(batch * length, head.weight.shape[0], dtype=dtype)
    with torch.no_grad():
        _C.head_logits(*head_arguments(hidden, head, rows, dtype), torch.get_num_threads(), logits)
    return logits.view(batch, length, -1)
