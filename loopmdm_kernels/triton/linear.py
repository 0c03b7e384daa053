"""Host side of the plain products; those of a block with their prologues and epilogues are in `block`."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.triton.config import Tiles, tiles
from loopmdm_kernels.triton.kernels.linear import linear_kernel, weight_gradient_kernel
from loopmdm_kernels.triton.launch import launch, processor
from loopmdm_kernels.values import ceil_div


def persistent_grid(tile: Tiles, rows: int, columns: int, device: torch.device) -> tuple[int]:
    """As many programs as multiprocessors can hold at once, at most one a tile."""
    number = ceil_div(rows, tile.m) * ceil_div(columns, tile.n)
    at_once = processor(device).multiprocessors * max(1, 8 // tile.num_warps)
    return (min(number, at_once),)


def linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    transposed: bool = False,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """a [T, K or more] times weight^T ([N, K]) + bias; `transposed`: times weight ([K, N]).

    weight_scale: [N], of a weight in e4m3. before: [T, N], the result is multiplied by the slope of GELU
    there. scale: [1], multiplies the result.
    Columns of a beyond K must hold zeros. Rows of a are contiguous, weight is.
    """
    (rows, depth), (real_depth, columns) = a.shape, weight.shape
    depth_stride, column_stride = columns, 1
    if not transposed:
        columns, real_depth = weight.shape
        depth_stride, column_stride = 1, real_depth
    out = torch.empty(rows, columns, dtype=out_dtype or a.dtype, device=a.device)
    tile = tiles("linear", (rows, columns, real_depth), a.dtype, processor(a.device))
    launch(
        linear_kernel,
        persistent_grid(tile, rows, columns, a.device),
        *(a, weight, weight_scale, bias, before, scale, out, rows, columns, depth),
        *(a.stride(0), depth_stride, column_stride, real_depth),
        **tile.options(),
    )
    return out


def weight_gradient(
    grad: Tensor,
    operand: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    accumulate: bool,
) -> None:
    """out [M, N] (+)= grad^T operand, bias [M] (+)= column sums of grad [T, M or more]; outputs are fp32."""
    rows, columns = out.shape
    tile = tiles("weight_gradient", (rows, columns, grad.shape[0]), grad.dtype, processor(grad.device))
    launch(
        weight_gradient_kernel,
        persistent_grid(tile, rows, columns, grad.device),
        *(grad, operand, scale, out, bias, rows, columns),
        *(grad.shape[0], grad.stride(0), grad.shape[1]),
        ACCUMULATE=accumulate,
        **tile.options(),
    )
