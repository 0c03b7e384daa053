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
from loopmdm_kernels.triton.head import chunk_of, matrix, modulated_rows, operand, sequence_stride, why_not
from loopmdm_kernels.triton.kernels.rows import modulated_rows_backward_kernel
from loopmdm_kernels.triton.kernels.vocabulary import (
    combine_cross_entropy_kernel,
    cross_entropy_kernel,
    logit_gradients_kernel,
)
from loopmdm_kernels.triton.launch import ceil_div, launch, power_of_two, processor
from loopmdm_kernels.triton.linear import linear, weight_gradient
from loopmdm_kernels.types import Fp8Head, Head

_GROUP_ELEMENTS = 1 << 27  # of logit gradients in memory at a time
_PADDING = 64  # tokens: loads of whole vectors in both directions
_PART = 32  # rows of a program on the way back through the norm


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
    h = modulated_rows(
        hidden.contiguous(), head.norm.contiguous(), operand(head.modulation, dtype), rows, dtype
    )
    tile = tiles("vocabulary", (vocab_size, size), dtype, processor(hidden.device))
    chunks = ceil_div(vocab_size, chunk_of(tile))
    top, total = hidden.new_empty(2, num_rows, chunks).unbind()
    target_logit, nll = hidden.new_empty(2, num_rows).unbind()
    log_sum_exp = hidden.new_empty(2, num_rows)
    launch(
        cross_entropy_kernel,
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
        combine_cross_entropy_kernel,
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
        grads: list[Tensor | None] = [None] * 5
        if any(wanted[:5]):
            upstream = grad_total * row_weights.float() + grad_nll
            grads = list(
                _gradients(
                    hidden.contiguous(),
                    norm.contiguous(),
                    weight,
                    bias.contiguous(),
                    modulation,
                    ctx.excluded_token,
                    targets,
                    rows,
                    log_sum_exp,
                    upstream,
                    ctx.dtype,
                    of_rows=wanted[0] or wanted[1] or wanted[4],
                    of_weight=wanted[2] or wanted[3],
                )
            )
        return (*grads, None, None, None, grad_rows, None)


def _gradients(
    hidden: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor,
    excluded_token: int,
    targets: Tensor,
    rows: Tensor,
    log_sum_exp: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    *,
    of_rows: bool,
    of_weight: bool,
) -> tuple[Tensor | None, ...]:
    """Of hidden, norm, weight, bias and modulation."""
    num_rows, (vocab_size, size) = rows.shape[0], weight.shape
    cast, cast_modulation = operand(weight, dtype), operand(modulation, dtype)
    h = modulated_rows(hidden, norm, cast_modulation, rows, dtype)
    padded = _PADDING * ceil_div(vocab_size, _PADDING)
    group = min(max(1, _GROUP_ELEMENTS // (128 * padded)) * 128, max(num_rows, 1))
    space = torch.empty(group, padded, dtype=dtype, device=hidden.device)
    tile = tiles("vocabulary", (vocab_size, size), dtype, processor(hidden.device))
    # Gradients of the logits relative to the largest upstream gradient, so that fp16 can hold them.
    largest = upstream.abs().amax().clamp_min(2.0**-100) if num_rows else upstream.new_ones(())
    scale = torch.exp2(largest.log2().floor()).reshape(1)
    grad_h = torch.empty(num_rows, size, device=hidden.device) if of_rows else None
    grad_weight = hidden.new_zeros(vocab_size, size) if of_weight else None
    grad_bias = hidden.new_zeros(vocab_size) if of_weight else None
    for first in range(0, num_rows, group):
        part = slice(first, min(first + group, num_rows))
        count = part.stop - first
        launch(
            logit_gradients_kernel,
            (ceil_div(count, tile.m), ceil_div(padded, tile.n)),
            h[part],
            cast,
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
        if grad_h is not None:
            grad_h[part] = linear(space[:count], cast, transposed=True, scale=scale, out_dtype=torch.float32)
        if grad_weight is not None:
            weight_gradient(space[:count], h[part], grad_weight, grad_bias, scale=scale, accumulate=first > 0)
    grad_hidden = grad_norm = grad_modulation = None
    if grad_h is not None:
        grad_hidden, grad_norm, grad_modulation = _rows_backward(hidden, rows, norm, cast_modulation, grad_h)
        grad_norm, grad_modulation = grad_norm.to(norm.dtype), grad_modulation.to(modulation.dtype)
    return (
        grad_hidden,
        grad_norm,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
        grad_modulation,
    )


def _rows_backward(
    hidden: Tensor, rows: Tensor, norm: Tensor, modulation: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, norm and modulation [M, 2, D] (fp32) from those of the modulated rows."""
    _, length, size = hidden.shape
    sequences, parts = modulation.shape[0], ceil_div(max(rows.shape[0], 1), _PART)
    grad_hidden = torch.zeros_like(hidden)
    sums = hidden.new_zeros(3, sequences, parts, size)
    launch(
        modulated_rows_backward_kernel,
        (sequences * parts,),
        hidden,
        rows,
        norm,
        modulation,
        grad,
        grad_hidden,
        *sums,
        rows.shape[0],
        size,
        length,
        sequence_stride(modulation),
        PART=_PART,
        HAS_ROWS=True,
        OWN_ROWS=sequences > 1,
        BLOCK_D=power_of_two(size),
        num_warps=4,
        num_stages=1,
    )
    of_norm, of_shift, of_scale = sums.sum(dim=2)
    return grad_hidden, of_norm.sum(dim=0), torch.stack((of_shift, of_scale), dim=1)
