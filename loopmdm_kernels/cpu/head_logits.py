"""`head_logits` on the CPU: float32 or bfloat16 operands, float32 sums, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels.calls import HeadCall, LogitsBackwardCall
from loopmdm_kernels.cpu.head import HeadGradients, head_operands, plain_operands, why_not
from loopmdm_kernels.gradients import Kept, differentiable

__all__ = ["run", "run_backward", "why_not"]


def run(call: HeadCall) -> Tensor:
    if call.trains:
        logits: Tensor = differentiable(call, lambda call, _: (_forward(call), Kept()), _backward)
        return logits
    return _forward(call)


def _forward(call: HeadCall) -> Tensor:
    from loopmdm_kernels import _C

    batch, length, _ = call.hidden.shape
    logits = torch.empty(batch, length, call.vocab_size, dtype=call.dtype)  # no view: callers write into it
    operands = head_operands(call, torch.arange(batch * length))
    _C.head_logits(*operands, torch.get_num_threads(), logits.flatten(0, 1))
    return logits


def _backward(
    call: HeadCall, _: Kept, wanted: Sequence[bool], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    return run_backward(LogitsBackwardCall(call.hidden, call.head, call.dtype, grads[0], wanted))


def run_backward(call: LogitsBackwardCall) -> Sequence[Tensor | None]:
    from loopmdm_kernels import _C

    num_rows = call.hidden.shape[0] * call.hidden.shape[1]
    with torch.no_grad():
        grads = HeadGradients(call, call.wanted, num_rows)
        if any(call.wanted):
            _C.head_logits_backward(
                **plain_operands(call, torch.arange(num_rows)),
                grad_logits=call.grad.to(call.dtype).reshape(num_rows, -1).contiguous(),
                **grads.arguments(),
            )
        return grads.results()
