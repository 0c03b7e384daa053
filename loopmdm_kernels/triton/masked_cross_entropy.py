"""`masked_cross_entropy` in Triton: masked rows only, gathered on the device; forward keeps no logits.

The backward pass makes the logits again, and their gradients in the dtype of the operands, for some rows at a
time. Two products turn these into the gradients of the rows and, summed in fp32, of weight and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.tracing import once_differentiable
from loopmdm_kernels.triton.config import tiles
from loopmdm_kernels.triton.head import chunk_of, matrix, modulated_rows, norm_of, operand, why_not
from loopmdm_kernels.triton.head_gradients import (
    LogitGradients,
    head_gradients,
    padded_vocabulary,
    rows_at_once,
)
from loopmdm_kernels.triton.kernels.masked_cross_entropy import (
    masked_cross_entropy_backward_kernel,
    masked_cross_entropy_combine_kernel,
    masked_cross_entropy_kernel,
)
from loopmdm_kernels.triton.launch import ceil_div, launch, power_of_two, processor
from loopmdm_kernels.types import Fp8Head, Head


def supports(*, hidden: Tensor, head: Head | Fp8Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    return why_not(hidden, head, compute_dtype)


def masked_cross_entropy(
    hidden: Tensor,
    head: Head | Fp8Head,
    targets: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype or head.weight.dtype
    targets, rows = targets.contiguous(), rows.contiguous()
    if isinstance(head, Fp8Head):
        nll, _ = _forward(hidden, head, targets, rows, dtype)
        return (nll * row_weights.float()).sum(), nll
    total, nll = _MaskedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, *head, targets, rows, row_weights, dtype
    )
    return total, nll


def _forward(
    hidden: Tensor, head: Head | Fp8Head, targets: Tensor, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """-log p of each row, and [2, R]: the largest logit and the log of the sum relative to it."""
    num_rows, (vocab_size, size) = rows.shape[0], head.weight.shape
    h = modulated_rows(hidden.contiguous(), norm_of(head), operand(head.modulation, dtype), rows, dtype)
    tile = tiles("vocabulary", (vocab_size, size), dtype, processor(hidden.device))
    chunks = ceil_div(vocab_size, chunk_of(tile))
    top, total = hidden.new_empty(2, num_rows, chunks).unbind()
    target_logit, nll = hidden.new_empty(2, num_rows).unbind()
    log_sum_exp = hidden.new_empty(2, num_rows)
    launch(
        masked_cross_entropy_kernel,
        (ceil_div(num_rows, tile.m), chunks),
        h,
        *matrix(head.weight, dtype),
        head.bias.contiguous(),
        targets,
        rows,
        top,
        total,
        target_logit,
        num_rows,
        vocab_size,
        size,
        head.excluded_token,
        CHUNK=chunk_of(tile),
        BLOCK_M=tile.m,
        BLOCK_V=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    at_once = 4
    launch(
        masked_cross_entropy_combine_kernel,
        (ceil_div(num_rows, at_once),),
        top,
        total,
        target_logit,
        nll,
        log_sum_exp,
        num_rows,
        chunks,
        ROWS=at_once,
        CHUNKS=power_of_two(chunks),
        num_warps=4,
        num_stages=1,
    )
    return nll, log_sum_exp


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor,
        modulation: Tensor,
        excluded_token: int,
        targets: Tensor,
        rows: Tensor,
        row_weights: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        head = Head(norm, weight, bias, modulation, excluded_token)
        nll, log_sum_exp = _forward(hidden, head, targets, rows, dtype)
        ctx.save_for_backward(
            hidden, norm, weight, bias, modulation, targets, rows, row_weights, log_sum_exp, nll
        )
        ctx.excluded_token, ctx.dtype = excluded_token, dtype
        return (nll * row_weights.float()).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, norm, weight, bias, modulation, targets, rows, row_weights, log_sum_exp, nll = (
            ctx.saved_tensors
        )
        wanted = ctx.needs_input_grad
        grad_rows = (grad_total * nll).to(row_weights.dtype) if wanted[8] else None
        grads: tuple[Tensor | None, ...] = (None,) * 5
        if any(wanted[:5]):
            upstream = grad_total * row_weights.float() + grad_nll
            # Gradients of the logits relative to the largest upstream gradient, so that fp16 can hold them.
            largest = upstream.abs().amax().clamp_min(2.0**-100) if rows.shape[0] else upstream.new_ones(())
            scale = torch.exp2(largest.log2().floor()).reshape(1)
            cast = operand(weight, ctx.dtype)
            logit_gradients = _logit_gradients(
                cast,
                bias.contiguous(),
                ctx.excluded_token,
                targets,
                rows,
                log_sum_exp,
                upstream,
                scale,
                ctx.dtype,
            )
            leaves = (hidden, norm, weight, bias, modulation)
            grads = head_gradients(leaves, cast, rows, logit_gradients, scale=scale, wanted=wanted[:5])
        return (*grads, None, None, None, grad_rows, None)


def _logit_gradients(
    weight: Tensor,
    bias: Tensor,
    excluded_token: int,
    targets: Tensor,
    rows: Tensor,
    log_sum_exp: Tensor,
    upstream: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> LogitGradients:
    """Makes the gradients of the logits of some rows, relative to scale, in the same memory each time."""
    vocab_size, size = weight.shape
    padded = padded_vocabulary(vocab_size)
    space = upstream.new_empty(rows_at_once(vocab_size, rows.shape[0]), padded, dtype=dtype)
    tile = tiles("vocabulary", (vocab_size, size), dtype, processor(upstream.device))

    def make(part: slice, h: Tensor) -> Tensor:
        count = h.shape[0]
        launch(
            masked_cross_entropy_backward_kernel,
            (ceil_div(count, tile.m), ceil_div(padded, tile.n)),
            h,
            weight,
            bias,
            targets,
            rows[part],
            log_sum_exp[0, part],
            log_sum_exp[1, part],
            upstream[part],
            scale,
            space,
            count,
            vocab_size,
            padded,
            size,
            excluded_token,
            BLOCK_M=tile.m,
            BLOCK_V=tile.n,
            BLOCK_K=tile.k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return space[:count]

    return make
