"""What the ops that end in the vocabulary head have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loopmdm_kernels.calls import HeadCall
from loopmdm_kernels.triton.config import Tiles
from loopmdm_kernels.triton.kernels.modulated_rows import (
    modulated_rows_backward_kernel,
    modulated_rows_kernel,
)
from loopmdm_kernels.triton.launch import launch, power_of_two
from loopmdm_kernels.triton.linear import linear, weight_gradient
from loopmdm_kernels.triton.operands import DTYPES, MAX_HIDDEN, operand
from loopmdm_kernels.types import Fp8Head, Head
from loopmdm_kernels.values import ceil_div

_GROUP_ELEMENTS = 1 << 27  # of logit gradients in memory at a time
_PADDING = 64  # tokens: loads of whole vectors in both directions
_PART = 32  # rows of a program on the way back through the norm

# Of a part of the rows, given these normalised: [n, V or more], with zeros in the columns beyond V.
LogitGradients = Callable[[slice, Tensor], Tensor]


def why_not(call: HeadCall) -> str | None:
    if call.hidden.dtype != torch.float32:
        return f"hidden must be float32, got {call.hidden.dtype}"
    if call.hidden.shape[-1] > MAX_HIDDEN:
        return f"hidden may be {MAX_HIDDEN} wide, got {call.hidden.shape[-1]}"
    if call.head.norm is None:
        return "it has no kernel for a head without a norm"
    for name, value in call.head._asdict().items():
        if isinstance(value, Tensor) and value.dtype not in DTYPES:
            return f"head.{name} must be float32, bfloat16 or float16, got {value.dtype}"
    if call.dtype not in DTYPES:
        return f"compute_dtype must be float32, bfloat16 or float16, got {call.compute_dtype}"
    return None


def modulated_rows(call: HeadCall, rows: Tensor) -> Tensor:
    """The rows after the final norm and its modulation, [R, D] in `call.dtype`."""
    hidden, modulation, dtype = (
        call.hidden.contiguous(),
        operand(call.head.modulation, call.dtype),
        call.dtype,
    )
    _, length, size = hidden.shape
    out = torch.empty(rows.shape[0], size, dtype=dtype, device=hidden.device)
    at_once = 4
    launch(
        modulated_rows_kernel,
        (ceil_div(rows.shape[0], at_once),),
        *(hidden, rows, norm_of(call.head), modulation, out),
        *(rows.shape[0], size, length, sequence_stride(modulation)),
        ROWS=at_once,
        BLOCK_D=power_of_two(size),
        num_warps=4,
        num_stages=1,
    )
    return out


def norm_of(head: Head | Fp8Head) -> Tensor:
    assert head.norm is not None  # or this backend is not asked, see why_not
    return head.norm.detach().contiguous()


def chunk_of(tile: Tiles) -> int:
    """Tokens of a program: few enough for one block of rows to fill most of a large GPU."""
    return 4 * tile.n


def sequence_stride(modulation: Tensor) -> int:
    """Elements from a sequence's modulation [M, ., D], contiguous, to the next one's; 0 if M = 1."""
    return 0 if modulation.shape[0] == 1 else modulation.shape[1] * modulation.shape[2]


def padded_vocabulary(vocab_size: int) -> int:
    return _PADDING * ceil_div(vocab_size, _PADDING)


def rows_at_once(vocab_size: int, num_rows: int) -> int:
    """How many rows' gradients of logits are in memory together."""
    return min(max(1, _GROUP_ELEMENTS // (128 * padded_vocabulary(vocab_size))) * 128, max(num_rows, 1))


def head_gradients(
    call: HeadCall,
    rows: Tensor,
    logit_gradients: LogitGradients,
    wanted: Sequence[bool],
    *,
    cast: Tensor,
    scale: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Of hidden, norm, weight, bias and modulation, where one of its kind is wanted.

    The gradients of the logits are in memory for some rows at a time. Two products turn these into the
    gradients of the rows and, summed in fp32, of weight and bias.

    Args:
        cast: the weight as the products take it.
        scale: [1], what the gradients of the logits are relative to.
    """
    of_rows, of_weight = wanted[0] or wanted[1] or wanted[4], wanted[2] or wanted[3]
    hidden, head = call.hidden, call.head
    num_rows, (vocab_size, size) = rows.shape[0], cast.shape
    h = modulated_rows(call, rows)
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
    found = (None, None, None) if grad_h is None else _rows_backward(call, rows, grad_h)
    return (
        found[0],
        found[1],
        None if grad_weight is None else grad_weight.to(head.weight.dtype),
        None if grad_bias is None else grad_bias.to(head.bias.dtype),
        found[2],
    )


def _rows_backward(call: HeadCall, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, norm and modulation [M, 2, D] from those of the modulated rows, in fp32."""
    hidden, norm = call.hidden.contiguous(), norm_of(call.head)
    modulation = operand(call.head.modulation, call.dtype)
    _, length, size = hidden.shape
    sequences, parts = modulation.shape[0], ceil_div(max(rows.shape[0], 1), _PART)
    grad_hidden = torch.zeros_like(hidden)
    sums = hidden.new_zeros(3, sequences, parts, size)
    launch(
        modulated_rows_backward_kernel,
        (sequences * parts,),
        *(hidden, rows, norm, modulation, grad, grad_hidden, *sums),
        *(rows.shape[0], size, length, sequence_stride(modulation)),
        PART=_PART,
        HAS_ROWS=True,
        OWN_ROWS=sequences > 1,
        BLOCK_D=power_of_two(size),
        num_warps=4,
        num_stages=1,
    )
    of_norm, of_shift, of_scale = sums.sum(dim=2)
    of_modulation = torch.stack((of_shift, of_scale), dim=1)
    return grad_hidden, of_norm.sum(dim=0).to(norm.dtype), of_modulation.to(call.head.modulation.dtype)
