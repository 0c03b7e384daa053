"""`head_logits` in Triton: one product with the final norm before it; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.triton.head import matrix, modulated_rows, operand, why_not
from loopmdm_kernels.triton.linear import linear
from loopmdm_kernels.types import Fp8Head, Head


def supports(*, hidden: Tensor, head: Head | Fp8Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    tensors = (hidden, head.norm, head.weight, head.bias, head.modulation)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return "it has no gradients"
    return why_not(hidden, head, compute_dtype)


def head_logits(hidden: Tensor, head: Head | Fp8Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    dtype = compute_dtype or head.weight.dtype
    batch, length, _ = hidden.shape
    rows = torch.arange(batch * length, device=hidden.device)
    norm, modulation = head.norm.contiguous(), operand(head.modulation, dtype)
    h = modulated_rows(hidden.detach().contiguous(), norm, modulation, rows, dtype)
    weight, weight_scale = matrix(head.weight, dtype)
    return linear(h, weight, head.bias.contiguous(), weight_scale=weight_scale).view(batch, length, -1)
