"""What the ops that end in the vocabulary head hand to their kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.cpu.packing import packed_linear
from loopmdm_kernels.types import Head

OPERAND_DTYPES = (torch.float32, torch.bfloat16)


def why_not(hidden: Tensor, head: Head, compute_dtype: torch.dtype | None) -> str | None:
    """Why these arguments need another backend, or None."""
    if hidden.dtype != torch.float32:
        return f"hidden must be float32, got {hidden.dtype}"
    if head.weight.dtype not in OPERAND_DTYPES:
        return f"head.weight must be float32 or bfloat16, got {head.weight.dtype}"
    if (compute_dtype or head.weight.dtype) not in OPERAND_DTYPES:
        return f"compute_dtype must be float32 or bfloat16, got {compute_dtype}"
    return None


def norm_or_ones(norm: Tensor | None, hidden: Tensor) -> Tensor:
    """The scale of the norm as kernels read it; they also read it where there is no norm."""
    return torch.ones(hidden.shape[-1]) if norm is None else norm.float().contiguous()


def head_arguments(
    hidden: Tensor, head: Head, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool]:
    """The first arguments of `_C.sample_rows` and `_C.head_logits`, the weight packed for this processor."""
    bf16 = dtype == torch.bfloat16
    shift, scale = head.modulation.to(dtype).unbind(1)
    return (
        hidden.contiguous(),
        rows.contiguous(),
        norm_or_ones(head.norm, hidden),
        shift.float().contiguous(),
        (1 + scale).float().contiguous(),
        packed_linear(head.weight, bf16=bf16),
        head.bias.float().contiguous(),
        head.norm is not None,
        bf16,
    )
