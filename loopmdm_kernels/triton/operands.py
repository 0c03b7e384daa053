"""Tensors as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.triton.launch import processor
from loopmdm_kernels.types import Fp8Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HIDDEN = 8192  # a row is held in registers


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
