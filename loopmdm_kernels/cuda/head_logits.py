"""`head_logits` on Hopper: one product with the final norm before it; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.cuda.head import Operands, why_not
from loopmdm_kernels.cuda.parameters import structure
from loopmdm_kernels.types import Head

SOURCE = "head/head_logits_sm90.cu"
Parameters = structure(SOURCE, "HeadLogitsParameters")
_ROWS = 1024  # whose logits are in fp32 at a time


def supports(*, hidden: Tensor, head: Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    tensors = (hidden, head.norm, head.weight, head.bias, head.modulation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "it has no gradients"
    return why_not(hidden, head, compute_dtype)


def head_logits(hidden: Tensor, head: Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    batch, length, _ = hidden.shape
    rows = torch.arange(batch * length, device=hidden.device)
    operands = Operands(hidden, head._replace(excluded_token=-1), rows)  # whose logit is wanted too
    out = hidden.new_empty(batch * length, operands.vocab_size, dtype=torch.bfloat16)
    for part in operands.parts(_ROWS):
        out[part] = row_logits(operands, part)
    return out.view(batch, length, -1)


def row_logits(operands: Operands, part: slice) -> Tensor:
    """Logits [., V] of some of the rows, in fp32."""
    num_rows = operands.normalised[part].shape[0]
    out = torch.empty(num_rows, operands.vocab_size, device=operands.device, dtype=torch.float32)
    operands.reduce_logits(operands.with_logits(SOURCE), Parameters, part, out=out)
    return out
