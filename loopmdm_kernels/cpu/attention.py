"""`attention` on the CPU: products of float32 or of bfloat16 with float32 sums, no scores in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.tracing import once_differentiable
from loopmdm_kernels.types import Rotary

_DTYPES = (torch.float32, torch.bfloat16)


def supports(*, q: Tensor) -> str | None:
    """Why these arguments need another backend, or None."""
    if q.dtype not in _DTYPES:
        return f"q must be float32 or bfloat16, got {q.dtype}"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, rotary: Rotary | None = None
) -> Tensor:
    reason = supports(q=q)
    if reason is not None:
        raise ValueError(f"attention on the CPU: {reason}")
    cos, sin = (None, None) if rotary is None else (angle.detach().float().contiguous() for angle in rotary)
    mask = None if key_mask is None else key_mask.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _Attention.apply(q, k, v, mask, cos, sin)  # type: ignore[no-untyped-call]
        return out
    return _forward(_rows(q), _rows(k), _rows(v), mask, cos, sin)


def _rows(x: Tensor) -> Tensor:
    """x, or a copy if its rows are not contiguous; any other strides are read where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """[B, H, L, K] with the heads of a position side by side, as the projections around attention want it."""
    batch, heads, length, head_dim = x.shape
    strides = (length * heads * head_dim, head_dim, heads * head_dim, 1)
    return torch.empty_strided((batch, heads, length, head_dim), strides, dtype=x.dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    log_sum_exp: Tensor | None = None,
) -> Tensor:
    from loopmdm_kernels import _C

    out = _like(q)
    _C.attention(q, k, v, key_mask, cos, sin, torch.get_num_threads(), out, log_sum_exp)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        log_sum_exp = torch.empty(q.shape[:3], dtype=torch.float32)
        out = _forward(q, k, v, key_mask, cos, sin, log_sum_exp)
        ctx.save_for_backward(q, k, v, key_mask, cos, sin, out, log_sum_exp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from loopmdm_kernels import _C

        q, k, v, key_mask, cos, sin, out, log_sum_exp = ctx.saved_tensors
        grad = _rows(grad.resolve_neg())  # an incoming gradient may have the lazy negative bit
        grads = [_like(q) for _ in range(3)]
        _C.attention_backward(
            q, k, v, key_mask, cos, sin, torch.get_num_threads(), out, log_sum_exp, grad, *grads
        )
        return (*grads, None, None, None)
