"""Bidirectional attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import differentiable, register, register_autograd, register_flops
from loopmdm_kernels.tracing import traced
from loopmdm_kernels.types import Rotary


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, rotary: Rotary | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over all L positions, no causal mask, no dropout.

    Args:
        q, k, v: [B, H, L, K] of one float dtype; K is even where `rotary` is given.
        key_mask: [B, L] bool, True at keys that may be attended; None: all.
        rotary: angles [L, K/2] applied to q and k first.

    Returns:
        [B, H, L, K] in the dtype of q.
    """
    checks.tensor("q", q, dtypes=checks.FLOATS, shape=("B", "H", "L", "K"))
    checks.not_empty("q", q)
    for name, value in (("k", k), ("v", v)):
        checks.tensor(name, value, dtypes=(q.dtype,), shape=tuple(q.shape), device=q.device)
    batch, _, length, head_dim = q.shape
    checks.key_mask(key_mask, batch, length, q.device)
    if rotary is not None and head_dim % 2:
        raise ValueError(f"rotary: needs an even head size, got K = {head_dim}")
    checks.rotary(rotary, length, head_dim, q.device)
    q, k, v, rotary = checks.plain((q, k, v, rotary))
    cos, sin = rotary or (None, None)
    if traced(q):
        out: Tensor = torch.ops.loopmdm.attention(q, k, v, key_mask, cos, sin)
        return out
    return _run(q, k, v, key_mask, cos, sin)


def _run(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    rotary = None if cos is None or sin is None else Rotary(cos, sin)
    implementation = backends.implementation("attention", q.device, q=q)
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = implementation(q, k, v, key_mask=key_mask, rotary=rotary)
    return out


def _backward_run(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with differentiable():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        out = _run(q, k, v, key_mask, cos, sin)
        grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), grad)
    return grad_q, grad_k, grad_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.loopmdm.attention_backward(grad, *ctx.saved_tensors), None, None, None)


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cos, Tensor? sin"
register(
    f"attention({_ARGUMENTS}) -> Tensor",
    lambda *args: _run(*args).contiguous(),
    lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
)
register(
    f"attention_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    lambda *args: tuple(grad.contiguous() for grad in _backward_run(*args)),
    lambda grad, q, *_: tuple(torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3)),
)
register_autograd("attention", _backward, _setup_context)
register_flops("attention", lambda q, *_, out_val=None: 4 * q.numel() * q.shape[-2])
