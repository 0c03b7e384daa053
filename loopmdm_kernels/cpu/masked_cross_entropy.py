"""`masked_cross_entropy` on the CPU: float32 or bfloat16 products, float32 sums, no [R, V] of its own.

The weight gradient's memory is taken in the forward pass, where it holds exponentials of the logits until
the backward pass has turned them into that gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels.calls import CrossEntropyCall
from loopmdm_kernels.cpu.head import HeadGradients, plain_operands, weight_gradient_memory, why_not
from loopmdm_kernels.gradients import Kept, differentiable

__all__ = ["run", "why_not"]


def run(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    targets = call.targets.flatten()[call.rows]
    call = CrossEntropyCall(call.hidden, call.head, call.compute_dtype, targets, call.rows, call.row_weights)
    if call.trains:
        total, nll = differentiable(call, _forward, _backward)
        return total, nll
    return _forward(call, (False,) * 6)[0]


def _forward(call: CrossEntropyCall, wanted: Sequence[bool]) -> tuple[tuple[Tensor, Tensor], Kept]:
    """targets: [R], of the rows."""
    from loopmdm_kernels import _C

    num_rows, weight = call.rows.shape[0], call.head.weight
    tile_largest = exponentials = None
    if any(wanted[:5]):
        tile_largest = torch.empty(_C.cross_entropy_tiles(call.vocab_size), num_rows, dtype=torch.float32)
    if wanted[2] and num_rows:
        assert isinstance(weight, Tensor)
        exponentials = weight_gradient_memory(weight, num_rows)
    largest, row_sum, nll = (torch.empty(num_rows, dtype=torch.float32) for _ in range(3))
    total = torch.empty((), dtype=torch.float32)
    _C.masked_cross_entropy(
        **plain_operands(call, call.rows),
        targets=call.targets,
        excluded_token=call.head.excluded_token,
        row_weights=call.row_weights.float().contiguous(),
        total=total,
        largest=largest,
        sum=row_sum,
        nll=nll,
        tile_largest=tile_largest,
        exponentials=exponentials,
    )
    return (total, nll), Kept((largest, row_sum, nll, tile_largest), [exponentials])


def _backward(
    call: CrossEntropyCall, kept: Kept, wanted: Sequence[bool], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    from loopmdm_kernels import _C

    (largest, row_sum, nll, tile_largest), grad_total = kept.tensors, grads[0]
    exponentials = kept.rest.pop() if kept.rest else None  # they can be read once
    found = HeadGradients(call, wanted[:5], call.rows.shape[0], exponentials)
    if any(wanted[:5]):
        _C.masked_cross_entropy_backward(
            **plain_operands(call, call.rows),
            targets=call.targets,
            excluded_token=call.head.excluded_token,
            largest=largest,
            sum=row_sum,
            nll=nll,
            tile_largest=tile_largest,
            exponentials=exponentials,
            grad_nll=grad_total * call.row_weights.float() + grads[1],
            **found.arguments(),
        )
    return *found.results(), (grad_total * nll).to(call.row_weights.dtype) if wanted[5] else None
