"""`masked_cross_entropy` on the CPU: float32 or bfloat16 products, float32 sums, no logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    narrow = (compute_dtype or head.weight.dtype) == torch.bfloat16
    total, nll = _MaskedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, *head, targets.flatten()[rows], rows, row_weights, narrow
    )
    return total, nll


def _problem(
    hidden: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor,
    excluded_token: int,
    targets: Tensor,
    rows: Tensor,
    narrow: bool,
) -> dict[str, Any]:
    """The arguments that both directions of the kernel share."""
    shift, scale = modulation.float().unbind(1)
    return {
        "hidden": hidden.contiguous(),
        "rows": rows.contiguous(),
        "targets": targets,
        "norm": norm.float().contiguous(),
        "shift": shift.contiguous(),
        "gain": 1 + scale,
        "weight": weight.contiguous(),
        "bias": bias.float().contiguous(),
        "excluded_token": excluded_token,
        "narrow": narrow,
        "num_threads": torch.get_num_threads(),
    }


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
        narrow: bool,
    ) -> tuple[Tensor, Tensor]:
        from loopmdm_kernels import _C

        problem = _problem(hidden, norm, weight, bias, modulation, excluded_token, targets, rows, narrow)
        top, row_sum, nll = (torch.empty(rows.shape[0]) for _ in range(3))
        total = torch.empty(())
        _C.masked_cross_entropy(
            **problem,
            row_weights=row_weights.float().contiguous(),
            total=total,
            top=top,
            sum=row_sum,
            nll=nll,
        )
        ctx.save_for_backward(
            hidden, norm, weight, bias, modulation, targets, rows, row_weights, top, row_sum, nll
        )
        ctx.excluded_token, ctx.narrow = excluded_token, narrow
        return total, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        from loopmdm_kernels import _C

        hidden, norm, weight, bias, modulation, *others = ctx.saved_tensors
        targets, rows, row_weights, top, row_sum, nll = others
        want_hidden, want_norm, want_weight, want_bias, want_modulation = ctx.needs_input_grad[:5]

        def zeros(wanted: bool, like: Tensor) -> Tensor | None:
            return torch.zeros(like.shape) if wanted else None

        # The kernel writes these in full if there is a row.
        make = torch.empty if rows.shape[0] else torch.zeros
        sums_in_weight_dtype = rows.shape[0] <= _C.CROSS_ENTROPY_GROUP_ROWS
        weight_dtype = weight.dtype if sums_in_weight_dtype else torch.float32
        grad_weight = make(weight.shape, dtype=weight_dtype) if want_weight else None
        grad_bias = make(bias.shape) if want_bias else None
        grad_hidden, grad_norm = zeros(want_hidden, hidden), zeros(want_norm, norm)
        grad_shift, grad_scale = (zeros(want_modulation, modulation[:, 0]) for _ in range(2))
        if any(ctx.needs_input_grad[:5]):
            problem = _problem(
                hidden, norm, weight, bias, modulation, ctx.excluded_token, targets, rows, ctx.narrow
            )
            _C.masked_cross_entropy_backward(
                **problem,
                top=top,
                sum=row_sum,
                nll=nll,
                nll_grad=grad_total * row_weights.float() + grad_nll,
                hidden_grad=grad_hidden,
                norm_grad=grad_norm,
                shift_grad=grad_shift,
                scale_grad=grad_scale,
                weight_grad=grad_weight,
                bias_grad=grad_bias,
            )
        grad_modulation = None
        if grad_shift is not None and grad_scale is not None:
            grad_modulation = torch.stack((grad_shift, grad_scale), 1).to(modulation.dtype)
        return (
            grad_hidden,
            None if grad_norm is None else grad_norm.to(norm.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            grad_modulation,
            None,
            None,
            None,
            (grad_total * nll).to(row_weights.dtype) if ctx.needs_input_grad[8] else None,
            None,
        )
