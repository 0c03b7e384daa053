"""Persistent products: each program takes every n-th tile of the result until there are none left."""

import triton.language as tl

from loopmdm_kernels.triton.kernels.common import (
    dot,
    gelu_slope,
    launched,
    product,
    rounded,
    scaled_and_biased,
    tile_origin,
)


@launched
def linear_kernel(
    a_ptr,  # [T, K]
    b_ptr,  # element (k, n) at k * b_depth_stride + n * b_col_stride
    weight_scale_ptr,  # [N] fp32, or None: column n of the product is multiplied by it
    bias_ptr,  # [N], or None
    before_ptr,  # [T, N] GELU's argument, or None: the result is multiplied by its slope
    scale_ptr,  # [1] fp32, or None: the result is multiplied by it
    out_ptr,  # [T, N]
    num_rows,
    num_cols,
    depth,
    a_row_stride,
    b_depth_stride,
    b_col_stride,
    b_depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, 8)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = product(
            a_ptr,
            a_row_stride,
            b_ptr,
            b_depth_stride,
            b_col_stride,
            row,
            col,
            num_rows,
            num_cols,
            depth,
            b_depth,
            BLOCK_K,
        )
        at = row.to(tl.int64)[:, None] * num_cols + col[None, :]
        mask = (row < num_rows)[:, None] & (col < num_cols)[None, :]
        acc = scaled_and_biased(acc, weight_scale_ptr, bias_ptr, col, num_cols)
        if scale_ptr is not None:
            acc *= tl.load(scale_ptr)
        if before_ptr is not None:
            # The gradient of GELU's result is rounded where the reference model keeps it.
            acc = rounded(acc, out_ptr.dtype.element_ty).to(tl.float32)
            acc *= gelu_slope(tl.load(before_ptr + at, mask=mask, other=0.0).to(tl.float32))
        tl.store(out_ptr + at, rounded(acc, out_ptr.dtype.element_ty), mask=mask)


@launched
def weight_gradient_kernel(
    a_ptr,  # [T, M]: gradients of the result, rows a_row_stride apart, a_cols of which can be loaded
    b_ptr,  # [T, N]: operands
    scale_ptr,  # [1] fp32, or None
    out_ptr,  # [M, N] fp32
    bias_ptr,  # [M] fp32, or None
    num_rows,  # M
    num_cols,  # N
    tokens,
    a_row_stride,
    a_cols,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (+)= a^T b and bias (+)= column sums of a, in fp32."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, 8)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + k.to(tl.int64)[None, :] * a_row_stride + row[:, None]
        b_ptrs = b_ptr + k.to(tl.int64)[:, None] * num_cols + col[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for k0 in range(0, tokens, BLOCK_K):
            k_exists = k0 + k < tokens
            a = tl.load(a_ptrs, mask=(row < a_cols)[:, None] & k_exists[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(col < num_cols)[None, :] & k_exists[:, None], other=0.0)
            acc = dot(a, b, acc)
            if bias_ptr is not None:
                if tile_n == 0:
                    sums += tl.sum(a.to(tl.float32), axis=1)
            a_ptrs += tl.cast(a_row_stride, tl.int64) * BLOCK_K
            b_ptrs += tl.cast(num_cols, tl.int64) * BLOCK_K
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
        at = row.to(tl.int64)[:, None] * num_cols + col[None, :]
        mask = (row < num_rows)[:, None] & (col < num_cols)[None, :]
        acc *= scale
        if ACCUMULATE:
            acc += tl.load(out_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, acc, mask=mask)
        if bias_ptr is not None:
            if tile_n == 0:
                sums *= scale
                if ACCUMULATE:
                    sums += tl.load(bias_ptr + row, mask=row < num_rows, other=0.0)
                tl.store(bias_ptr + row, sums, mask=row < num_rows)
