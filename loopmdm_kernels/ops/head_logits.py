"""Logits at every position, for callers that want them; training and sampling never do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.calls import HeadCall, LogitsBackwardCall
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import Operator
from loopmdm_kernels.types import Fp8Head, Head


def head_logits(
    hidden: Tensor, head: Head | Fp8Head | Tensor, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Logits [B, L, V] in the compute dtype, the excluded token's included.

    Args:
        hidden: [B, L, D] float32 or float64, the residual stream before the final norm.
        head: final norm, modulation and vocabulary projection, or a weight [V, D] alone, see `Head.of`.
        compute_dtype: dtype of the projection's operands and of the result; None: that of `head.weight`,
            unless this is fp8.
    """
    checks.tensor("hidden", hidden, dtypes=checks.STREAM_FLOATS, shape=("B", "L", "D"))
    checks.not_empty("hidden", hidden)
    batch, _, hidden_size = hidden.shape
    head = checks.given_head(head)
    checks.head(head, hidden_size, batch, hidden.device)
    checks.compute_dtype(compute_dtype)
    if isinstance(head, Fp8Head):
        checks.for_inference("head", compute_dtype, hidden=hidden)
    logits: Tensor = OPERATOR(checks.plain(HeadCall(hidden, head, compute_dtype)))
    return logits


def _backward(call: HeadCall, wanted: Sequence[bool], grads: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Without the logits, which are not needed."""
    found: Sequence[Tensor | None] = backends.run(
        "head_logits_backward", LogitsBackwardCall(call.hidden, call.head, call.dtype, grads[0], wanted)
    )
    return found


OPERATOR = Operator(
    HeadCall,
    "head_logits(Tensor hidden, Tensor? norm, Tensor weight, Tensor? weight_scale, Tensor bias, "
    "Tensor modulation, ScalarType compute_dtype) -> Tensor",
    fake=lambda call: call.hidden.new_empty(*call.hidden.shape[:2], call.vocab_size, dtype=call.dtype),
    flops=lambda call, _: 2 * call.hidden.shape[0] * call.hidden.shape[1] * call.head.weight.shape.numel(),
    leaves=(0, 1, 2, 4, 5),
    backward=_backward,
)
