"""`masked_cross_entropy` in Triton: masked rows only, gathered on the device; forward keeps no logits.

The backward pass makes the logits again, and their gradients in the dtype of the operands, for some rows at a
time. Two products turn these into the gradients of the rows and, summed in fp32, of weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels.calls import CrossEntropyCall
from loopmdm_kernels.gradients import Kept, differentiable
from loopmdm_kernels.triton.config import tiles
from loopmdm_kernels.triton.head import (
    LogitGradients,
    chunk_of,
    head_gradients,
    modulated_rows,
    padded_vocabulary,
    rows_at_once,
    why_not,
)
from loopmdm_kernels.triton.kernels.masked_cross_entropy import (
    masked_cross_entropy_backward_kernel,
    masked_cross_entropy_combine_kernel,
    masked_cross_entropy_kernel,
)
from loopmdm_kernels.triton.launch import launch, power_of_two, processor
from loopmdm_kernels.triton.operands import matrix
from loopmdm_kernels.values import ceil_div

__all__ = ["run", "why_not"]


def run(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    if call.trains:
        total, nll = differentiable(call, _forward, _backward)
        return total, nll
    return _forward(call, ())[0]


def _forward(call: CrossEntropyCall, _: Sequence[bool]) -> tuple[tuple[Tensor, Tensor], Kept]:
    """Kept: [2, R], the largest logit and the log of the sum relative to it; nll."""
    rows, head, num_rows = call.rows.contiguous(), call.head, call.rows.shape[0]
    vocab_size, size = shape = (call.vocab_size, call.hidden.shape[-1])
    tile = tiles("vocabulary", shape, call.dtype, processor(call.hidden.device))
    chunks = ceil_div(vocab_size, chunk_of(tile))
    top, sums = (call.hidden.new_empty(num_rows, chunks) for _ in range(2))
    target_logit, nll = (call.hidden.new_empty(num_rows) for _ in range(2))
    log_sum_exp = call.hidden.new_empty(2, num_rows)
    launch(
        masked_cross_entropy_kernel,
        (ceil_div(num_rows, tile.m), chunks),
        modulated_rows(call, rows),
        *matrix(head.weight, call.dtype),
        *(head.bias.contiguous(), call.targets.contiguous(), rows, top, sums, target_logit),
        *(num_rows, vocab_size, size, head.excluded_token),
        CHUNK=chunk_of(tile),
        **tile.options("MVK"),
    )
    at_once = 4
    launch(
        masked_cross_entropy_combine_kernel,
        (ceil_div(num_rows, at_once),),
        *(top, sums, target_logit, nll, log_sum_exp, num_rows, chunks),
        ROWS=at_once,
        CHUNKS=power_of_two(chunks),
        num_warps=4,
        num_stages=1,
    )
    return ((nll * call.row_weights.float()).sum(), nll), Kept((log_sum_exp, nll))


def _backward(
    call: CrossEntropyCall, kept: Kept, wanted: Sequence[bool], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    log_sum_exp, nll = kept.tensors
    assert log_sum_exp is not None and nll is not None
    grad_total, grad_nll = grads
    grad_rows = (grad_total * nll).to(call.row_weights.dtype) if wanted[5] else None
    if not any(wanted[:5]):
        return *[None] * 5, grad_rows
    upstream = grad_total * call.row_weights.float() + grad_nll
    # Gradients of the logits relative to the largest upstream gradient, so that fp16 can hold them.
    largest = upstream.abs().amax().clamp_min(2.0**-100) if len(upstream) else upstream.new_ones(())
    scale = torch.exp2(largest.log2().floor()).reshape(1)
    weight, _ = matrix(call.head.weight, call.dtype)
    logit_gradients = _logit_gradients(call, weight, log_sum_exp, upstream, scale)
    rows = call.rows.contiguous()
    return *head_gradients(call, rows, logit_gradients, wanted[:5], cast=weight, scale=scale), grad_rows


def _logit_gradients(
    call: CrossEntropyCall, weight: Tensor, log_sum_exp: Tensor, upstream: Tensor, scale: Tensor
) -> LogitGradients:
    """Makes the gradients of the logits of some rows, relative to scale, in the same memory each time."""
    vocab_size, size = weight.shape
    targets, rows, bias = call.targets.contiguous(), call.rows.contiguous(), call.head.bias.contiguous()
    padded = padded_vocabulary(vocab_size)
    space = upstream.new_empty(rows_at_once(vocab_size, rows.shape[0]), padded, dtype=call.dtype)
    tile = tiles("vocabulary", (vocab_size, size), call.dtype, processor(upstream.device))

    def make(part: slice, h: Tensor) -> Tensor:
        count = h.shape[0]
        launch(
            masked_cross_entropy_backward_kernel,
            (ceil_div(count, tile.m), ceil_div(padded, tile.n)),
            *(h, weight, bias, targets, rows[part], *log_sum_exp[:, part], upstream[part], scale, space),
            *(count, vocab_size, padded, size, call.head.excluded_token),
            **tile.options("MVK"),
        )
        return space[:count]

    return make
