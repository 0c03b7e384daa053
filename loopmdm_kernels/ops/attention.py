"""Bidirectional attention."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.calls import AttentionCall
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import Operator
from loopmdm_kernels.types import Rotary


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, rotary: Rotary | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over all L positions, no causal mask, no dropout.

    Args:
        q: [B, H, L, K] of a float dtype; K is even where `rotary` is given.
        k: like q.
        v: like q.
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
    out: Tensor = OPERATOR(checks.plain(AttentionCall(q, k, v, key_mask, rotary)))
    return out


OPERATOR = Operator(
    AttentionCall,
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cos, Tensor? sin) -> Tensor",
    fake=lambda call: torch.empty_like(call.q, memory_format=torch.contiguous_format),
    flops=lambda call, _: 4 * call.q.numel() * call.q.shape[-2],
    traced=lambda _, out: out.contiguous(),
    leaves=(0, 1, 2),
)
