"""`masked_cross_entropy` on Hopper: masked rows only, gathered on the device; forward keeps no logits.

The backward pass makes the logits again, and their gradients in bf16, for some rows at a time. Two products
turn these into the gradients of the rows and, summed in fp32, of weight and bias. Sums have a fixed order;
only a row that is listed twice adds to the stream's gradient with atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels.calls import CrossEntropyCall
from loopmdm_kernels.cuda import head
from loopmdm_kernels.cuda.head import (
    CHUNK,
    RING_BYTES,
    ROW_THREADS,
    Operands,
    pointers,
    with_logits,
)
from loopmdm_kernels.cuda.launch import Kernel, launch, persistent_blocks, set_map
from loopmdm_kernels.cuda.parameters import structure
from loopmdm_kernels.cuda.tensor_maps import layout
from loopmdm_kernels.gradients import Kept, differentiable
from loopmdm_kernels.values import ceil_div

FORWARD = "head/masked_cross_entropy_sm90.cu"
BACKWARD = with_logits("head/masked_cross_entropy_backward_sm90.cu", 128)  # the kernel of 64 rows spills
COMBINE = Kernel("head/masked_cross_entropy_combine_sm90.cu", ROW_THREADS)
_TILE = (128, 256)  # of a product with the gradients of the logits
_PAIR = 2  # blocks, with the same columns
_PAIR_ROWS = _PAIR * _TILE[0]
_INNER = 64  # of its inner dimension, a stage
_PRODUCT = "head/masked_cross_entropy_product_sm90.cu"
_PRODUCT_BYTES = 4 * 2 * _INNER * sum(_TILE) + RING_BYTES
OF_ROWS, OF_WEIGHT = (
    Kernel(_PRODUCT, 384, _PRODUCT_BYTES, (("LOOPMDM_OF_WEIGHT", of_weight),), _PAIR) for of_weight in (0, 1)
)
_PART = 32  # rows of a block on the way back through the norm
ROWS_BACKWARD = Kernel("head/modulated_rows_backward_sm90.cu", ROW_THREADS, 16 * _PART)
_GROUP_ELEMENTS = 1 << 28  # of logit gradients in memory at a time

ForwardParameters = structure(FORWARD, "MaskedCrossEntropyParameters")
CombineParameters = structure(COMBINE.source, "MaskedCrossEntropyCombineParameters")
BackwardParameters = structure(BACKWARD.source, "MaskedCrossEntropyBackwardParameters")
ProductParameters = structure(OF_ROWS.source, "MaskedCrossEntropyProductParameters")
RowsBackwardParameters = structure(ROWS_BACKWARD.source, "ModulatedRowsBackwardParameters")


def why_not(call: CrossEntropyCall) -> str | None:
    kernels = [head.for_rows(FORWARD, call.rows.shape[0]), COMBINE]
    if call.trains:
        kernels += [BACKWARD, OF_ROWS, OF_WEIGHT, ROWS_BACKWARD]
    return head.why_not(call, *kernels)


def run(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    if call.trains:
        total, nll = differentiable(call, _forward, _backward)
        return total, nll
    return _forward(call, ())[0]


def _forward(call: CrossEntropyCall, _: Sequence[bool]) -> tuple[tuple[Tensor, Tensor], Kept]:
    operands = Operands(call, call.rows)
    records = call.hidden.new_empty(operands.chunks, operands.num_rows, 2)
    target_logit, nll, largest, log_sum = call.hidden.new_empty(4, operands.num_rows).unbind()
    operands.reduce_logits(
        operands.with_logits(FORWARD),
        ForwardParameters,
        targets=call.targets.contiguous(),
        rows=operands.rows,
        records=records,
        target_logit=target_logit,
    )
    combined = {"nll": nll, "largest": largest, "log_sum": log_sum}
    parameters = CombineParameters(
        **pointers({"records": records, "target_logit": target_logit, **combined}),
        num_rows=operands.num_rows,
        chunks=operands.chunks,
    )
    launch(COMBINE, parameters, operands.row_blocks, operands.device)
    return ((nll * call.row_weights.float()).sum(), nll), Kept((nll, largest, log_sum))


def _backward(
    call: CrossEntropyCall, kept: Kept, wanted: Sequence[bool], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    nll, *_ = kept.tensors
    grad_total, grad_nll = grads
    grad_row_weights = (grad_total * nll).to(call.row_weights.dtype) if wanted[5] else None
    found: list[Tensor | None] = [None] * 5
    if any(wanted[:5]):
        operands, head = Operands(call, call.rows), call.head
        upstream = grad_total * call.row_weights.float() + grad_nll
        grad_rows, grad_weight, grad_bias = _products(
            operands,
            call.targets.contiguous(),
            kept,
            upstream,
            want_rows=wanted[0] or wanted[1] or wanted[4],
            want_weight=wanted[2] or wanted[3],
        )
        if grad_weight is not None and grad_bias is not None:
            found[2:4] = grad_weight.to(head.weight.dtype), grad_bias.to(head.bias.dtype)
        if grad_rows is not None and head.norm is not None:
            found[0], grad_norm, grad_modulation = _rows_backward(operands, grad_rows)
            found[1], found[4] = grad_norm.to(head.norm.dtype), grad_modulation.to(head.modulation.dtype)
    return *found, grad_row_weights


def _products(
    operands: Operands,
    targets: Tensor,
    kept: Kept,
    upstream: Tensor,
    *,
    want_rows: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the modulated rows, of weight and of bias, in fp32."""
    _, largest, log_sum = kept.tensors
    assert largest is not None and log_sum is not None
    num_rows, vocab_size, size = operands.num_rows, operands.vocab_size, operands.weight.shape[1]
    pitch = CHUNK * operands.chunks
    # Groups of one size, whole tiles.
    groups = max(1, ceil_div(num_rows, max(1, _GROUP_ELEMENTS // (_PAIR_ROWS * pitch)) * _PAIR_ROWS))
    group = ceil_div(max(num_rows, 1), groups * _PAIR_ROWS) * _PAIR_ROWS
    space = operands.weight.new_empty(min(group, num_rows), pitch)
    grad_rows = largest.new_empty(num_rows, size) if want_rows else None
    # Without rows nothing is launched.
    new = largest.new_empty if num_rows else largest.new_zeros
    grad_weight = new(vocab_size, size) if want_weight else None
    bias_parts = new(4, ceil_div(vocab_size, _PAIR_ROWS) * _PAIR_ROWS) if want_weight else None
    for first in range(0, num_rows, group):
        part = slice(first, min(first + group, num_rows))
        count = part.stop - first
        operands.reduce_logits(
            BACKWARD,
            BackwardParameters,
            part,
            targets=targets,
            rows=operands.rows[part],
            largest=largest[part],
            log_sum=log_sum[part],
            upstream=upstream[part],
            gradients=space,
            pitch=pitch,
        )
        gradients = space[:count]
        if grad_rows is not None:
            _product(OF_ROWS, gradients, vocab_size, operands.weight, grad_rows[part], vocab_size)
        if grad_weight is not None:
            rows = operands.normalised[part]
            _product(OF_WEIGHT, gradients, vocab_size, rows, grad_weight, count, bias_parts, first > 0)
    grad_bias = None if bias_parts is None else bias_parts[:, :vocab_size].sum(0)
    return grad_rows, grad_weight, grad_bias


def _product(
    kernel: Kernel,
    gradients: Tensor,
    vocab_size: int,
    right: Tensor,
    out: Tensor,
    inner: int,
    bias_parts: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out = or += gradients, or with OF_WEIGHT their transpose, times `right`; `inner` are summed over."""
    rows, columns = out.shape
    column_tiles = ceil_div(columns, _TILE[1])
    parameters = ProductParameters(
        **pointers({"out": out, "bias_parts": bias_parts}),
        tiles=ceil_div(rows, _PAIR_ROWS) * column_tiles,
        rows=rows,
        columns=columns,
        column_tiles=column_tiles,
        steps=ceil_div(inner, _INNER),
        accumulate=int(accumulate),
    )
    left = layout(gradients[None], _INNER if kernel is OF_WEIGHT else _TILE[0])
    left = left._replace(sizes=(vocab_size, *left.sizes[1:]))  # what lies beyond is not read
    set_map(parameters, "left", left)
    set_map(parameters, "right", layout(right[None], _INNER))
    launch(kernel, parameters, persistent_blocks(kernel, parameters.tiles, out.device), out.device)


def _rows_backward(operands: Operands, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, norm and modulation from those of the modulated rows, in fp32."""
    sequences, _, size = operands.modulation.shape
    parts = ceil_div(operands.num_rows, _PART)
    grad_hidden = torch.zeros_like(operands.hidden)
    sums = grad.new_empty(sequences, parts, 2, size)
    parameters = RowsBackwardParameters(
        source=operands.source_rows(),
        **pointers({"grad": grad, "grad_hidden": grad_hidden, "sums": sums}),
        parts=parts,
    )
    launch(ROWS_BACKWARD, parameters, sequences * parts, operands.device)
    product, total = sums.sum(1).unbind(1)
    factor = (1 + operands.modulation[:, 1]).float()
    return grad_hidden, (product * factor).sum(0), torch.stack((total, product * operands.norm), dim=1)
