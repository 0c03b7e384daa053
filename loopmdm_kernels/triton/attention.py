"""`attention` in Triton: rotary positions applied as q and k are loaded, log-sum-exp kept for backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.calls import AttentionCall
from loopmdm_kernels.gradients import Kept, differentiable
from loopmdm_kernels.layouts import heads_beside, whole_rows
from loopmdm_kernels.triton.config import Tiles, tiles
from loopmdm_kernels.triton.kernels.attention import attention_kernel
from loopmdm_kernels.triton.kernels.attention_backward import attention_gradient_kernel
from loopmdm_kernels.triton.launch import launch, power_of_two, processor
from loopmdm_kernels.triton.operands import DTYPES
from loopmdm_kernels.types import Rotary
from loopmdm_kernels.values import ceil_div

_MAX_HEAD_DIM = 256


def why_not(call: AttentionCall) -> str | None:
    if call.dtype not in DTYPES:
        return f"q must be float32, bfloat16 or float16, got {call.dtype}"
    return why_not_heads(call.q.shape[-1])


def why_not_heads(head_dim: int) -> str | None:
    return None if head_dim <= _MAX_HEAD_DIM else f"the head size may be {_MAX_HEAD_DIM}, got {head_dim}"


class Positions(NamedTuple):
    """Which keys count, and the angles of all positions."""

    mask: Tensor | None = None  # uint8 [B, L]
    cos: Tensor | None = None  # [L, K/2] in the dtype of q and k, to which the reference model rounds them
    sin: Tensor | None = None

    @classmethod
    def of(cls, key_mask: Tensor | None, rotary: Rotary | None, dtype: torch.dtype) -> Positions:
        mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        return cls(mask, *(angle.detach().to(dtype).contiguous() for angle in rotary or ()))


class Result(NamedTuple):
    """The last dimension of all is contiguous."""

    out: Tensor  # [B, H, L, K]
    rest: Tensor | None  # what rounding took from it: gradients of scores are small differences to out . grad
    log_sum_exp: Tensor  # [B, H, L] to base 2

    @classmethod
    def empty(cls, out: Tensor, *, keep: bool) -> Result:
        """For the forward pass to fill; `keep`: for a backward pass."""
        rest = torch.empty_like(out) if keep and out.dtype != torch.float32 else None
        return cls(out, rest, torch.empty(out.shape[:3], device=out.device, dtype=torch.float32))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, positions: Positions, result: Result, active: Tensor | None = None
) -> None:
    """Fills `result`; `active`: of the sequences where it is not 0."""
    mask, cos, sin = positions
    tile, grid, sizes, blocks = _geometry(q, backward=False)
    launch(
        attention_kernel,
        grid,
        *(q, k, v, mask, active, cos, sin, *result),
        *_strides(q, k, v, result.out),
        *sizes,
        **blocks,
        **tile.options("MN"),
    )


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, positions: Positions, result: Result, grad: Tensor, out: Sequence[Tensor]
) -> None:
    """Fills `out` with the gradients of q, k and v; the last dimension of all is contiguous."""
    inner = torch.empty_like(result.log_sum_exp)
    tile, grid, sizes, blocks = _geometry(q, backward=True)
    grad_q, grad_k, grad_v = out
    of_queries = (q, grad, k, v), result[:2], (grad_q, None)
    of_keys = (k, v, q, grad), (None, None), (grad_k, grad_v)
    for (operands, outs, grads), keys in ((of_queries, False), (of_keys, True)):  # the second reads inner
        launch(
            attention_gradient_kernel,
            grid,
            *(*operands, *positions, *outs, result.log_sum_exp, inner, *grads),
            *_strides(*operands, outs[0], *grads),
            *sizes,
            OF_KEYS=keys,
            **blocks,
            **tile.options("MN"),
        )


def _geometry(q: Tensor, *, backward: bool) -> tuple[Tiles, tuple[int], tuple[float, ...], dict[str, int]]:
    """Tiles, grid, sizes and blocks of a launch."""
    batch, heads, length, head_dim = q.shape
    tile = tiles("attention", (length, head_dim, int(backward)), q.dtype, processor(q.device))
    half = ceil_div(head_dim, 2)
    sizes = (heads, length, half, head_dim, 1.0 / math.sqrt(head_dim))
    blocks = {"HALF": power_of_two(half, 16), "BLOCK_K": power_of_two(head_dim, 16)}
    return tile, (ceil_div(length, tile.m) * batch * heads,), sizes, blocks


def _strides(*tensors: Tensor | None) -> list[int | None]:
    nothing = (None,) * 3
    return [s for tensor in tensors for s in (nothing if tensor is None else tensor.stride()[:3])]


def run(call: AttentionCall) -> Tensor:
    out: Tensor = differentiable(call, _forward, _backward) if call.trains else _forward(call, ())[0]
    return out


def _forward(call: AttentionCall, wanted: Sequence[bool]) -> tuple[Tensor, Kept]:
    positions = Positions.of(call.key_mask, call.rotary, call.dtype)
    result = Result.empty(heads_beside(call.q), keep=any(wanted))
    q, k, v = map(whole_rows, call.leaves)
    attention_forward(q, k, v, positions, result)
    return result.out, Kept(result)


def _backward(call: AttentionCall, kept: Kept, _: object, grads: Sequence[Tensor]) -> Sequence[Tensor]:
    out, rest, log_sum_exp = kept.tensors
    assert out is not None and log_sum_exp is not None
    positions = Positions.of(call.key_mask, call.rotary, call.dtype)
    found = [heads_beside(call.q) for _ in range(3)]
    result, grad = Result(out, rest, log_sum_exp), whole_rows(grads[0])
    q, k, v = map(whole_rows, call.leaves)
    attention_backward(q, k, v, positions, result, grad, found)
    return found
