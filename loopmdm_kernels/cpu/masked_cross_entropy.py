"""`masked_cross_entropy` on the CPU: float32 or bfloat16 products, float32 sums, no [R, V] of its own.

The weight gradient's memory is taken in the forward pass, where it holds exponentials of the logits until
the backward pass has turned them into that gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.cpu.head_gradients import HeadGradients, head_problem, weight_gradient_memory
from loopmdm_kernels.tracing import once_differentiable
from loopmdm_kernels.types import Head

_DTYPES = (torch.float32, torch.bfloat16)


def supports(*, hidden: Tensor, head: Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    if hidden.dtype != torch.float32:
        return f"hidden must be float32, got {hidden.dtype}"
    if head.weight.dtype not in _DTYPES:
        return f"head.weight must be float32 or bfloat16, got {head.weight.dtype}"
    if (compute_dtype or head.weight.dtype) not in _DTYPES:
        return f"compute_dtype must be float32 or bfloat16, got {compute_dtype}"
    return None


def masked_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    reason = supports(hidden=hidden, head=head, compute_dtype=compute_dtype)
    if reason is not None:
        raise ValueError(f"masked_cross_entropy on the CPU: {reason}")
    bf16 = (compute_dtype or head.weight.dtype) == torch.bfloat16
    total, nll = _MaskedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, *head, targets.flatten()[rows], rows, row_weights, bf16, torch.is_grad_enabled()
    )
    return total, nll


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor,
        modulation: Tensor,
        excluded_token: int,
        targets: Tensor,
        rows: Tensor,
        row_weights: Tensor,
        bf16: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        from loopmdm_kernels import _C

        num_rows = rows.shape[0]
        tile_largest = exponentials = None
        if grad_enabled and any(ctx.needs_input_grad[:5]):
            tile_largest = torch.empty(_C.cross_entropy_tiles(weight.shape[0]), num_rows, dtype=torch.float32)
        if grad_enabled and ctx.needs_input_grad[2] and num_rows:
            exponentials = weight_gradient_memory(weight, num_rows)
        problem = head_problem((hidden, norm, weight, bias, modulation), rows, bf16)
        largest, row_sum, nll = (torch.empty(num_rows, dtype=torch.float32) for _ in range(3))
        total = torch.empty((), dtype=torch.float32)
        _C.masked_cross_entropy(
            **problem,
            targets=targets,
            excluded_token=excluded_token,
            row_weights=row_weights.float().contiguous(),
            total=total,
            largest=largest,
            sum=row_sum,
            nll=nll,
            tile_largest=tile_largest,
            exponentials=exponentials,
        )
        ctx.save_for_backward(
            hidden, norm, weight, bias, modulation, targets, rows, row_weights, largest, row_sum, nll, tile_largest
        )
        ctx.excluded_token, ctx.bf16, ctx.exponentials = excluded_token, bf16, exponentials
        return total, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        from loopmdm_kernels import _C

        *leaves, targets, rows, row_weights, largest, row_sum, nll, tile_largest = ctx.saved_tensors
        exponentials, ctx.exponentials = ctx.exponentials, None  # they can be read once
        wanted = ctx.needs_input_grad[:5]
        grads = HeadGradients(tuple(leaves), wanted, rows.shape[0], exponentials)
        if any(wanted):
            _C.masked_cross_entropy_backward(
                **head_problem(leaves, rows, ctx.bf16),
                targets=targets,
                excluded_token=ctx.excluded_token,
                largest=largest,
                sum=row_sum,
                nll=nll,
                tile_largest=tile_largest,
                exponentials=exponentials,
                grad_nll=grad_total * row_weights.float() + grad_nll,
                **grads.arguments(),
            )
        return (
            *grads.results(),
            None,
            None,
            None,
            (grad_total * nll).to(row_weights.dtype) if ctx.needs_input_grad[8] else None,
            None,
            None,
        )
