"""softmax(q k^T / sqrt(K)) v over all positions, with rotary positions and a key mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.calls import AttentionCall
from loopmdm_kernels.tracing import transformed
from loopmdm_kernels.types import Rotary

SHORT = 256  # tokens


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate pairs (i, i + K/2) of x [..., L, K]. Angles are rounded to x's dtype; the product is not."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (angle.to(x.dtype).to(wide) for angle in rotary)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def run(call: AttentionCall) -> Tensor:
    return attention(call.q, call.k, call.v, key_mask=call.key_mask, rotary=call.rotary)


def attention(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None, rotary: Rotary | None) -> Tensor:
    if rotary is not None:
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
    if q.dtype == torch.float64 or transformed():  # PyTorch's fused attention has no rules for transforms
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) / math.sqrt(q.shape[-1])
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
        return (torch.softmax(scores, dim=-1) @ v.to(wide)).to(q.dtype)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    # On short sequences the CPU kernel's backward pass is several times slower in bf16 (docs/measured.md).
    wide = torch.float32 if q.device.type == "cpu" and q.shape[-2] < SHORT else q.dtype
    out = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), attn_mask=mask)
    return out.to(q.dtype)
