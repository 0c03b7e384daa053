"""Gradients of hidden and head from those of the logits, which are in memory for some rows at a time.

Two products turn these into the gradients of the rows and, summed in fp32, of weight and bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loopmdm_kernels.triton.head import modulated_rows, operand, sequence_stride
from loopmdm_kernels.triton.kernels.modulated_rows import modulated_rows_backward_kernel
from loopmdm_kernels.triton.launch import ceil_div, launch, power_of_two
from loopmdm_kernels.triton.linear import linear, weight_gradient

_GROUP_ELEMENTS = 1 << 27  # of logit gradients in memory at a time
_PADDING = 64  # tokens: loads of whole vectors in both directions
_PART = 32  # rows of a program on the way back through the norm

# Of a part of the rows, given these normalised: [n, V or more], with zeros in the columns beyond V.
LogitGradients = Callable[[slice, Tensor], Tensor]


def padded_vocabulary(vocab_size: int) -> int:
    return _PADDING * ceil_div(vocab_size, _PADDING)


def rows_at_once(vocab_size: int, num_rows: int) -> int:
    """How many rows' gradients of logits are in memory together."""
    return min(max(1, _GROUP_ELEMENTS // (128 * padded_vocabulary(vocab_size))) * 128, max(num_rows, 1))


def head_gradients(
    leaves: Sequence[Tensor],
    cast: Tensor,
    rows: Tensor,
    logit_gradients: LogitGradients,
    *,
    scale: Tensor | None = None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of the leaves hidden, norm, weight, bias and modulation, where one of its kind is wanted.

    cast: weight as the products take it. scale: [1], what the gradients of the logits are relative to.
    """
    hidden, norm, weight, bias, modulation = leaves
    of_rows, of_weight = wanted[0] or wanted[1] or wanted[4], wanted[2] or wanted[3]
    hidden, norm = hidden.contiguous(), norm.contiguous()
    num_rows, (vocab_size, size) = rows.shape[0], weight.shape
    cast_modulation = operand(modulation, cast.dtype)
    h = modulated_rows(hidden, norm, cast_modulation, rows, cast.dtype)
    group = rows_at_once(vocab_size, num_rows)
    grad_h = torch.empty(num_rows, size, device=hidden.device, dtype=torch.float32) if of_rows else None
    grad_weight = hidden.new_zeros(vocab_size, size) if of_weight else None
    grad_bias = hidden.new_zeros(vocab_size) if of_weight else None
    for first in range(0, num_rows, group):
        part = slice(first, min(first + group, num_rows))
        slopes = logit_gradients(part, h[part])
        if grad_h is not None:
            grad_h[part] = linear(slopes, cast, transposed=True, scale=scale, out_dtype=torch.float32)
        if grad_weight is not None:
            weight_gradient(slopes, h[part], grad_weight, grad_bias, scale=scale, accumulate=first > 0)
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
