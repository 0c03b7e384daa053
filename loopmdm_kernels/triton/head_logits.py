"""`head_logits` in Triton: one product with the final norm before it; backward, two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.calls import HeadCall, LogitsBackwardCall
from loopmdm_kernels.gradients import Kept, differentiable
from loopmdm_kernels.triton.head import head_gradients, modulated_rows, padded_vocabulary, why_not
from loopmdm_kernels.triton.linear import linear
from loopmdm_kernels.triton.operands import matrix

__all__ = ["run", "run_backward", "why_not"]


def run(call: HeadCall) -> Tensor:
    if call.trains:
        logits: Tensor = differentiable(call, lambda call, _: (_forward(call), Kept()), _backward)
    else:
        logits = _forward(call)
    return logits.view(*call.hidden.shape[:2], -1)  # outside: callers write into it


def _rows(call: HeadCall) -> Tensor:
    return torch.arange(call.hidden.shape[0] * call.hidden.shape[1], device=call.hidden.device)


def _forward(call: HeadCall) -> Tensor:
    weight, weight_scale = matrix(call.head.weight, call.dtype)
    return linear(
        modulated_rows(call, _rows(call)), weight, call.head.bias.contiguous(), weight_scale=weight_scale
    )


def _backward(
    call: HeadCall, _: Kept, wanted: Sequence[bool], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    return run_backward(LogitsBackwardCall(call.hidden, call.head, call.dtype, grads[0], wanted))


def run_backward(call: LogitsBackwardCall) -> Sequence[Tensor | None]:
    padding = padded_vocabulary(call.vocab_size) - call.vocab_size
    flat = call.grad.to(call.dtype).reshape(-1, call.vocab_size).contiguous()

    def logit_gradients(part: slice, _: Tensor) -> Tensor:
        return F.pad(flat[part], (0, padding)) if padding else flat[part]

    with torch.no_grad():
        cast, _ = matrix(call.head.weight, call.dtype)
        grads = head_gradients(call, _rows(call), logit_gradients, call.wanted, cast=cast)
    return tuple(value if want else None for value, want in zip(grads, call.wanted, strict=True))
