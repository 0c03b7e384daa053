"""`masked_cross_entropy` on the CPU: float32 or bfloat16 products, float32 sums, no [R, V] of its own.

The weight gradient's memory is taken in the forward pass, where it holds exponentials of the logits until
the backward pass has turned them into that gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    narrow = (compute_dtype or head.weight.dtype) == torch.bfloat16
    total, nll = _MaskedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, *head, targets.flatten()[rows], rows, row_weights, narrow, torch.is_grad_enabled()
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


def _weight_gradient_memory(weight: Tensor, num_rows: int) -> Tensor:
    from loopmdm_kernels import _C

    sums_in_weight_dtype = num_rows <= _C.CROSS_ENTROPY_GROUP_ROWS
    return torch.empty(weight.shape, dtype=weight.dtype if sums_in_weight_dtype else torch.float32)


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
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        from loopmdm_kernels import _C

        num_rows = rows.shape[0]
        tile_top = exponentials = None
        if grad_enabled and any(ctx.needs_input_grad[:5]):
            tile_top = torch.empty(_C.cross_entropy_tiles(weight.shape[0]), num_rows)
        if grad_enabled and ctx.needs_input_grad[2] and num_rows:
            exponentials = _weight_gradient_memory(weight, num_rows)
        problem = _problem(hidden, norm, weight, bias, modulation, excluded_token, targets, rows, narrow)
        top, row_sum, nll = (torch.empty(num_rows) for _ in range(3))
        total = torch.empty(())
        _C.masked_cross_entropy(
            **problem,
            row_weights=row_weights.float().contiguous(),
            total=total,
            top=top,
            sum=row_sum,
            nll=nll,
            tile_top=tile_top,
            exponentials=exponentials,
        )
        ctx.save_for_backward(
            hidden, norm, weight, bias, modulation, targets, rows, row_weights, top, row_sum, nll, tile_top
        )
        ctx.excluded_token, ctx.narrow, ctx.exponentials = excluded_token, narrow, exponentials
        return total, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        from loopmdm_kernels import _C

        hidden, norm, weight, bias, modulation, *others = ctx.saved_tensors
        targets, rows, row_weights, top, row_sum, nll, tile_top = others
        exponentials, ctx.exponentials = ctx.exponentials, None  # they can be read once
        want_hidden, want_norm, want_weight, want_bias, want_modulation = ctx.needs_input_grad[:5]

        def zeros(wanted: bool, like: Tensor) -> Tensor | None:
            return torch.zeros(like.shape) if wanted else None

        grad_weight = grad_bias = None
        if want_weight:
            grad_weight = (
                _weight_gradient_memory(weight, rows.shape[0]) if exponentials is None else exponentials
            )
        if want_bias:
            grad_bias = torch.empty(bias.shape)
        if not rows.shape[0]:  # otherwise the kernel writes them in full
            for grad in (grad_weight, grad_bias):
                if grad is not None:
                    grad.zero_()
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
                tile_top=tile_top,
                exponentials=exponentials,
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
            None,
        )
