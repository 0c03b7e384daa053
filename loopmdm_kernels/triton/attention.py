"""`attention` in Triton: rotary positions applied as q and k are loaded, log-sum-exp kept for backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.tracing import once_differentiable
from loopmdm_kernels.triton.config import Tiles, tiles
from loopmdm_kernels.triton.head import OPERANDS
from loopmdm_kernels.triton.kernels.attention import attention_kernel
from loopmdm_kernels.triton.kernels.attention_backward import attention_gradient_kernel
from loopmdm_kernels.triton.launch import ceil_div, launch, power_of_two, processor
from loopmdm_kernels.types import Rotary

MAX_HEAD_DIM = 256


def supports(*, q: Tensor) -> str | None:
    """Why these arguments need another backend, or None."""
    if q.dtype not in OPERANDS:
        return f"q must be float32, bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the head size may be {MAX_HEAD_DIM}, got {q.shape[-1]}"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, rotary: Rotary | None = None
) -> Tensor:
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        q, k, v, mask_bytes(key_mask), *angles(rotary, q.dtype)
    )
    return out


def mask_bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def angles(rotary: Rotary | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Rounded to the dtype of q and k, as the reference model does."""
    if rotary is None:
        return None, None
    return rotary.cos.detach().to(dtype).contiguous(), rotary.sin.detach().to(dtype).contiguous()


def _strides(*tensors: Tensor | None) -> list[int | None]:
    nothing = (None,) * 3
    return [s for tensor in tensors for s in (nothing if tensor is None else tensor.stride()[:3])]


def _sizes(q: Tensor) -> tuple[tuple[int, int, int, int, float], dict[str, int]]:
    _, heads, length, head_dim = q.shape
    half = ceil_div(head_dim, 2)
    blocks = {"HALF": power_of_two(half, 16), "BLOCK_K": power_of_two(head_dim, 16)}
    return (heads, length, half, head_dim, 1.0 / math.sqrt(head_dim)), blocks


def _tiles(q: Tensor, *, backward: bool) -> Tiles:
    return tiles("attention", (q.shape[2], q.shape[3], int(backward)), q.dtype, processor(q.device))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    rest: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Fills out, returns the log-sum-exp to base 2 [B, H, L]; the last dimension of all is contiguous.

    rest: laid out like out; what rounding takes from out, for the backward pass.
    """
    log_sum_exp = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    tile = _tiles(q, backward=False)
    sizes, blocks = _sizes(q)
    launch(
        attention_kernel,
        (ceil_div(q.shape[2], tile.m) * q.shape[0] * q.shape[1],),
        *(q, k, v, mask, active, cos, sin, out, rest, log_sum_exp),
        *_strides(q, k, v, out),
        *sizes,
        **blocks,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return log_sum_exp


def rest_of(out: Tensor) -> Tensor | None:
    """Memory for what rounding takes from out; gradients of scores are small differences to out . grad."""
    return None if out.dtype == torch.float32 else torch.empty_like(out)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    rest: Tensor | None,
    log_sum_exp: Tensor,
    grad: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Fills grad_q, grad_k and grad_v; the last dimension of all is contiguous."""
    inner = torch.empty_like(log_sum_exp)
    tile = _tiles(q, backward=True)
    sizes, blocks = _sizes(q)
    of_queries = (q, grad, k, v), (out, rest), (grad_q, None)
    of_keys = (k, v, q, grad), (None, None), (grad_k, grad_v)
    for (operands, outs, grads), keys in ((of_queries, False), (of_keys, True)):  # the second reads inner
        launch(
            attention_gradient_kernel,
            (ceil_div(q.shape[2], tile.m) * q.shape[0] * q.shape[1],),
            *(*operands, mask, cos, sin, *outs, log_sum_exp, inner, *grads),
            *_strides(*operands, outs[0], *grads),
            *sizes,
            OF_KEYS=keys,
            **blocks,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _rows(x: Tensor) -> Tensor:
    """x, or a copy if its rows are not contiguous; any other strides are read where they are."""
    x = x.detach().resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """[B, H, L, K] with the heads of a position side by side, as the projections around attention want it."""
    batch, heads, length, head_dim = x.shape
    return torch.empty(batch, length, heads, head_dim, dtype=x.dtype, device=x.device).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        out = _like(q)
        rest = rest_of(out) if any(ctx.needs_input_grad) else None
        log_sum_exp = attention_forward(q, k, v, mask, cos, sin, out, rest)
        ctx.save_for_backward(q, k, v, mask, cos, sin, out, rest, log_sum_exp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, cos, sin, out, rest, log_sum_exp = ctx.saved_tensors
        grads = [_like(q) for _ in range(3)]
        attention_backward(q, k, v, mask, cos, sin, out, rest, log_sum_exp, _rows(grad), *grads)
        return (*grads, None, None, None)
