"""`head_logits` in Triton: one product with the final norm before it; backward, two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.tracing import once_differentiable
from loopmdm_kernels.triton.head import matrix, modulated_rows, norm_of, operand, why_not
from loopmdm_kernels.triton.head_gradients import head_gradients, padded_vocabulary
from loopmdm_kernels.triton.linear import linear
from loopmdm_kernels.types import Fp8Head, Head


def supports(*, hidden: Tensor, head: Head | Fp8Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    return why_not(hidden, head, compute_dtype)


def head_logits(hidden: Tensor, head: Head | Fp8Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    dtype = compute_dtype or head.weight.dtype
    if isinstance(head, Fp8Head):
        return _forward(hidden, head, dtype).view(*hidden.shape[:2], -1)
    logits: Tensor = _HeadLogits.apply(hidden, *head[:4], dtype)  # type: ignore[no-untyped-call]
    return logits.view(*hidden.shape[:2], -1)  # outside: callers write into it


def head_logits_backward(
    grad: Tensor,
    hidden: Tensor,
    head: Head,
    wanted: Sequence[bool],
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, norm, weight, bias and modulation, where wanted, from those of the logits."""
    dtype = compute_dtype or head.weight.dtype
    vocab_size = head.weight.shape[0]
    padding = padded_vocabulary(vocab_size) - vocab_size
    rows = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device)
    flat = grad.to(dtype).reshape(-1, vocab_size).contiguous()

    def logit_gradients(part: slice, _: Tensor) -> Tensor:
        return F.pad(flat[part], (0, padding)) if padding else flat[part]

    with torch.no_grad():
        cast = operand(head.weight, dtype)
        leaves = (hidden, norm_of(head), head.weight, head.bias, head.modulation)
        grads = head_gradients(leaves, cast, rows, logit_gradients, wanted=wanted)
    return tuple(value if want else None for value, want in zip(grads, wanted, strict=True))


def _forward(hidden: Tensor, head: Head | Fp8Head, dtype: torch.dtype) -> Tensor:
    batch, length, _ = hidden.shape
    rows = torch.arange(batch * length, device=hidden.device)
    norm, modulation = norm_of(head), operand(head.modulation, dtype)
    h = modulated_rows(hidden.detach().contiguous(), norm, modulation, rows, dtype)
    weight, weight_scale = matrix(head.weight, dtype)
    return linear(h, weight, head.bias.contiguous(), weight_scale=weight_scale)


class _HeadLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor,
        modulation: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(hidden, norm, weight, bias, modulation)
        ctx.dtype = dtype
        return _forward(hidden, Head(norm, weight, bias, modulation), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *leaves = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        grads = head_logits_backward(grad, hidden, Head(*leaves), wanted, compute_dtype=ctx.dtype)
        return (*grads, None)
