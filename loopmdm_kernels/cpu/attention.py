"""`attention` on the CPU: products of float32 or of bfloat16 with float32 sums, no scores in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels.calls import AttentionCall
from loopmdm_kernels.cpu.operands import DTYPES, vector
from loopmdm_kernels.gradients import Kept, differentiable
from loopmdm_kernels.layouts import heads_beside, whole_rows


def why_not(call: AttentionCall) -> str | None:
    if call.dtype not in DTYPES:
        return f"q must be float32 or bfloat16, got {call.dtype}"
    return None


def run(call: AttentionCall) -> Tensor:
    out: Tensor = differentiable(call, _with_statistics, _backward) if call.trains else _forward(call, None)
    return out


def _forward(call: AttentionCall, log_sum_exp: Tensor | None) -> Tensor:
    from loopmdm_kernels import _C

    out = heads_beside(call.q)
    _C.attention(*_operands(call), out, log_sum_exp)
    return out


def _with_statistics(call: AttentionCall, _: Sequence[bool]) -> tuple[Tensor, Kept]:
    log_sum_exp = torch.empty(call.q.shape[:3], dtype=torch.float32)
    out = _forward(call, log_sum_exp)
    return out, Kept((out, log_sum_exp))


def _backward(
    call: AttentionCall, kept: Kept, _: Sequence[bool], grads: Sequence[Tensor]
) -> Sequence[Tensor]:
    from loopmdm_kernels import _C

    out, log_sum_exp = kept.tensors
    grad = whole_rows(grads[0])
    found = [torch.empty_like(out) for _ in range(3)]  # laid out like it
    _C.attention_backward(*_operands(call), out, log_sum_exp, grad, *found)
    return found


def _operands(
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """What both kernels begin with."""
    cos, sin = (None, None) if call.rotary is None else map(vector, call.rotary)
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    q, k, v = map(whole_rows, call.leaves)
    return q, k, v, mask, cos, sin, torch.get_num_threads()
