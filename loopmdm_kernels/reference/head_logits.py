"""Final norm, modulation and vocabulary projection of selected rows, and the SUBS normalisation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.calls import HeadCall, LogitsBackwardCall
from loopmdm_kernels.reference.looped_blocks import norm_modulate
from loopmdm_kernels.types import Fp8Head, Head


def row_logits(call: HeadCall, rows: Tensor) -> Tensor:
    """Logits [R, V] of the rows (flat indices b*L + l) of hidden [B, L, D], in fp32 or float64.

    Operands are rounded to `call.dtype`; products are summed, and kept, in fp32 or wider. The reference
    model rounds the logits to bf16 here, which only loses accuracy and is not repeated.
    """
    dtype, hidden, head = call.dtype, call.hidden, call.head
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(head, Fp8Head):
        head = head.dequantized(dtype)
    length = hidden.shape[1]
    modulation = head.modulation.to(dtype).expand(hidden.shape[0], -1, -1)
    shift, scale = modulation[rows // length].unbind(1)
    h = norm_modulate(hidden.flatten(0, 1)[rows], head.norm, shift, scale).to(dtype)
    return F.linear(h.to(wide), head.weight.to(dtype).to(wide), head.bias.to(wide))


def run(call: HeadCall) -> Tensor:
    batch, length, _ = call.hidden.shape
    logits = row_logits(call, torch.arange(batch * length, device=call.hidden.device))
    return logits.to(call.dtype).view(batch, length, -1)


def run_backward(call: LogitsBackwardCall) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        pairs = zip(call.leaves, call.wanted, strict=True)
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_(want) for t, want in pairs]
        logits = run(HeadCall(leaves[0], Head(*leaves[1:]), call.compute_dtype))
        asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        grads = iter(torch.autograd.grad(logits, asked, call.grad))
    return tuple(next(grads) if want else None for want in call.wanted)


def subs_log_probs(logits: Tensor, excluded_token: int) -> Tensor:
    """log p(x0 | xt) of masked rows (MDLM, SUBS): the excluded token gets probability 0. [R, V]."""
    if excluded_token >= 0:
        excluded = torch.arange(logits.shape[-1], device=logits.device) == excluded_token
        logits = logits.masked_fill(excluded, -math.inf)
    return torch.log_softmax(logits, dim=-1)
