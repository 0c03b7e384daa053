"""What the ops that end in the vocabulary head have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.triton.config import Tiles
from loopmdm_kernels.triton.kernels.modulated_rows import modulated_rows_kernel
from loopmdm_kernels.triton.launch import ceil_div, launch, power_of_two, processor
from loopmdm_kernels.types import Fp8Head, Fp8Weight, Head

OPERANDS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HIDDEN = 8192  # a row is held in registers


def why_not(hidden: Tensor, head: Head | Fp8Head, compute_dtype: torch.dtype | None) -> str | None:
    """Why these arguments need another backend, or None."""
    if hidden.dtype != torch.float32:
        return f"hidden must be float32, got {hidden.dtype}"
    if hidden.shape[-1] > _MAX_HIDDEN:
        return f"hidden may be {_MAX_HIDDEN} wide, got {hidden.shape[-1]}"
    if head.norm is None:
        return "it has no kernel for a head without a norm"
    named: dict[str, Tensor | Fp8Weight] = dict(zip(Head._fields[:4], head[:4], strict=True))  # type: ignore[arg-type]
    for name, value in named.items():
        if value.dtype not in OPERANDS and not isinstance(value, Fp8Weight):
            return f"head.{name} must be float32, bfloat16 or float16, got {value.dtype}"
    if (compute_dtype or head.weight.dtype) not in OPERANDS:
        return f"compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}"
    return None


def modulated_rows(
    hidden: Tensor, norm: Tensor, modulation: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """The rows after the final norm and its modulation, [R, D] in `dtype`; hidden is contiguous."""
    _, length, size = hidden.shape
    out = torch.empty(rows.shape[0], size, dtype=dtype, device=hidden.device)
    at_once = 4
    launch(
        modulated_rows_kernel,
        (ceil_div(rows.shape[0], at_once),),
        hidden,
        rows,
        norm,
        modulation,
        out,
        rows.shape[0],
        size,
        length,
        sequence_stride(modulation),
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


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).contiguous()


def matrix(weight: Tensor | Fp8Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What products load, in `dtype` or e4m3, and what they multiply the columns of their results by."""
    if isinstance(weight, Tensor):
        return operand(weight, dtype), None
    values = weight.values.contiguous()
    # Before compute capability 8.9 there is no conversion of e4m3, and Triton has no such pointers.
    known = not 0 < processor(values.device).arch < 89
    return values if known else values.view(torch.uint8), weight.scale.contiguous()
