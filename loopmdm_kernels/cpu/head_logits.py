"""`head_logits` on the CPU: float32 or bfloat16 operands, float32 sums, rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.cpu.head import head_arguments, why_not
from loopmdm_kernels.cpu.head_gradients import HeadGradients, head_problem
from loopmdm_kernels.tracing import once_differentiable
from loopmdm_kernels.types import Head


def supports(*, hidden: Tensor, head: Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    return why_not(hidden, head, compute_dtype)


def head_logits(hidden: Tensor, head: Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    dtype = compute_dtype or head.weight.dtype
    logits: Tensor = _HeadLogits.apply(hidden, *head[:4], dtype)  # type: ignore[no-untyped-call]
    return logits


def head_logits_backward(
    grad: Tensor,
    hidden: Tensor,
    head: Head,
    wanted: tuple[bool, ...],
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, norm, weight, bias and modulation, where wanted, from those of the logits."""
    from loopmdm_kernels import _C

    dtype = compute_dtype or head.weight.dtype
    num_rows = hidden.shape[0] * hidden.shape[1]
    leaves = (hidden, *head[:4])
    with torch.no_grad():
        grads = HeadGradients(leaves, wanted, num_rows)
        if any(wanted):
            _C.head_logits_backward(
                **head_problem(leaves, torch.arange(num_rows), dtype == torch.bfloat16),
                grad_logits=grad.to(dtype).reshape(num_rows, -1).contiguous(),
                **grads.arguments(),
            )
        return grads.results()


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
        from loopmdm_kernels import _C

        batch, length, _ = hidden.shape
        rows = torch.arange(batch * length)
        logits = torch.empty(batch, length, weight.shape[0], dtype=dtype)  # no view: callers write into it
        head = Head(norm, weight, bias, modulation)
        _C.head_logits(
            *head_arguments(hidden, head, rows, dtype), torch.get_num_threads(), logits.flatten(0, 1)
        )
        ctx.save_for_backward(hidden, norm, weight, bias, modulation)
        ctx.dtype = dtype
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *leaves = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        grads = head_logits_backward(grad, hidden, Head(*leaves), wanted, compute_dtype=ctx.dtype)
        return (*grads, None)
