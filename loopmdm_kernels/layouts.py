"""How the kernels of attention want tensors to lie, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_rows(x: Tensor) -> Tensor:
    """x, or a copy if its rows are not contiguous; any other strides are read where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_beside(x: Tensor) -> Tensor:
    """New memory [B, H, L, K] with the heads of a position side by side, as projections take it."""
    _, heads, length, head_dim = x.shape
    strides = (length * heads * head_dim, head_dim, heads * head_dim, 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
