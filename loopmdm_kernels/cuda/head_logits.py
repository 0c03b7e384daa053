"""`head_logits` on Hopper: one product with the final norm before it; no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.calls import HeadCall
from loopmdm_kernels.cuda import head
from loopmdm_kernels.cuda.head import Operands
from loopmdm_kernels.cuda.parameters import structure

SOURCE = "head/head_logits_sm90.cu"
Parameters = structure(SOURCE, "HeadLogitsParameters")
_ROWS = 1024  # whose logits are in fp32 at a time


def why_not(call: HeadCall) -> str | None:
    if call.trains:
        return "it has no gradients"
    batch, length, _ = call.hidden.shape
    return head.why_not(call, head.for_rows(SOURCE, batch * length))


def run(call: HeadCall) -> Tensor:
    hidden = call.hidden
    batch, length, _ = hidden.shape
    rows = torch.arange(batch * length, device=hidden.device)
    operands = Operands(call, rows)
    operands.excluded_token = -1  # its logit is wanted too
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
