"""Final norm, modulation and vocabulary projection of selected rows, and the SUBS normalisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.reference.looped_blocks import norm_modulate
from loopmdm_kernels.types import Fp8Head, Head


def row_logits(
    hidden: Tensor, head: Head | Fp8Head, rows: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Logits [R, V] of the rows (flat indices b*L + l) of hidden [B, L, D], in fp32 or float64.

    Operands are rounded to `compute_dtype`; products are summed, and kept, in fp32 or wider. The reference
    model rounds the logits to bf16 here, which only loses accuracy and is not repeated.
    """
    dtype = compute_dtype or head.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(head, Fp8Head):
        head = head.dequantized(dtype)
    length = hidden.shape[1]
    modulation = head.modulation.to(dtype).expand(hidden.shape[0], -1, -1)
    shift, scale = modulation[rows // length].unbind(1)
    h = norm_modulate(hidden.flatten(0, 1)[rows], head.norm, shift, scale).to(dtype)
    return F.linear(h.to(wide), head.weight.to(dtype).to(wide), head.bias.to(wide))


def head_logits(hidden: Tensor, head: Head | Fp8Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    batch, length, _ = hidden.shape
    rows = torch.arange(batch * length, device=hidden.device)
    logits = row_logits(hidden, head, rows, compute_dtype)
    return logits.to(compute_dtype or head.weight.dtype).view(batch, length, -1)


def head_logits_backward(
    grad: Tensor,
    hidden: Tensor,
    head: Head,
    wanted: tuple[bool, ...],
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, norm, weight, bias and modulation, where wanted, from those of the logits."""
    with torch.enable_grad():
        pairs = zip((hidden, *head[:4]), wanted, strict=True)
        leaves = [None if t is None else t.detach().requires_grad_(want) for t, want in pairs]
        leaf, norm, weight, bias, modulation = leaves
        assert leaf is not None and weight is not None and bias is not None and modulation is not None
        logits = head_logits(leaf, Head(norm, weight, bias, modulation), compute_dtype=compute_dtype)
        grads = iter(
            torch.autograd.grad(logits, [t for t in leaves if t is not None and t.requires_grad], grad)
        )
    return tuple(next(grads) if want else None for want in wanted)


def subs_log_probs(logits: Tensor, excluded_token: int) -> Tensor:
    """log p(x0 | xt) of masked rows (MDLM, SUBS): the excluded token gets probability 0. [R, V]."""
    if excluded_token >= 0:
        excluded = torch.arange(logits.shape[-1], device=logits.device) == excluded_token
        logits = logits.masked_fill(excluded, -math.inf)
    return torch.log_softmax(logits, dim=-1)
