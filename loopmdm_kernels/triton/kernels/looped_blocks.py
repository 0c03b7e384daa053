"""`looped_blocks`: the two kinds of product of a block, persistent; moments of rows; the end of a loop."""

import triton.language as tl

from loopmdm_kernels.triton.kernels.common import (
    combined_moments,
    dot,
    gain,
    gelu,
    launched,
    product,
    rounded,
    scaled_and_biased,
    store_moments,
    tile_origin,
    widened,
)
from loopmdm_kernels.triton.kernels.philox import dropout_keep


@launched
def norm_linear_kernel(
    x_ptr,  # [T, K] fp32
    mean_ptr,  # [T, groups], partial moments of x
    square_ptr,
    norm_ptr,  # [K]
    modulation_ptr,  # shift of sequence b at b * modulation_stride, scale K further
    weight_ptr,  # [N, K]
    weight_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [N], or None
    active_ptr,  # [B] int8, or None: tiles without a row of an active sequence are left alone
    h_ptr,  # [T, K], or None: the modulated rows are kept there
    before_ptr,  # [T, N], or None: GELU's argument is kept there
    out_ptr,  # [T, N]
    num_rows,
    num_cols,
    depth,
    length,
    modulation_stride,
    GELU: tl.constexpr,
    ONE_SEQUENCE: tl.constexpr,  # the rows of a tile share their modulation
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """act(modulate(norm(x)) weight^T + bias), the modulated rows made as they are loaded."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, 8)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row_exists = row < num_rows
        sequence = row // length
        wanted = True
        if active_ptr is not None:
            active = tl.load(active_ptr + sequence, mask=row_exists, other=0)
            wanted = tl.max(active.to(tl.int32), axis=0) > 0
        if wanted:
            mean, deviation = combined_moments(mean_ptr, square_ptr, row, num_rows, depth, GROUPS)
            k = tl.arange(0, BLOCK_K)
            x_ptrs = x_ptr + row.to(tl.int64)[:, None] * depth + k[None, :]
            w_ptrs = weight_ptr + col.to(tl.int64)[None, :] * depth + k[:, None]
            if ONE_SEQUENCE:
                at_first = tl.cast(tile_m * BLOCK_M // length, tl.int64) * modulation_stride
                shift_ptrs = (modulation_ptr + at_first + k)[None, :]
            else:
                shift_ptrs = modulation_ptr + sequence.to(tl.int64)[:, None] * modulation_stride + k[None, :]
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k0 in range(0, depth, BLOCK_K):
                k_exists = k0 + k < depth
                exists = row_exists[:, None] & k_exists[None, :]
                x = tl.load(x_ptrs, mask=exists, other=0.0)
                norm = tl.load(norm_ptr + k0 + k, mask=k_exists, other=0.0)[None, :]
                mask = k_exists[None, :] if ONE_SEQUENCE else exists
                shift = tl.load(shift_ptrs, mask=mask, other=0.0)
                scale = tl.load(shift_ptrs + depth, mask=mask, other=0.0)
                h = (x - mean[:, None]) * deviation[:, None] * gain(norm, scale) + shift.to(tl.float32)
                h = rounded(tl.where(exists, h, 0.0), dtype)
                if h_ptr is not None:
                    if tile_n == 0:
                        at = row.to(tl.int64)[:, None] * depth + (k0 + k)[None, :]
                        tl.store(h_ptr + at, h, mask=exists)
                w = tl.load(w_ptrs, mask=(col < num_cols)[None, :] & k_exists[:, None], other=0.0)
                acc = dot(h, widened(w, dtype), acc)
                x_ptrs += BLOCK_K
                w_ptrs += BLOCK_K
                shift_ptrs += BLOCK_K
            acc = scaled_and_biased(acc, weight_scale_ptr, bias_ptr, col, num_cols)
            at = row.to(tl.int64)[:, None] * num_cols + col[None, :]
            mask = row_exists[:, None] & (col < num_cols)[None, :]
            out = rounded(acc, dtype)
            if GELU:
                if before_ptr is not None:
                    tl.store(before_ptr + at, out, mask=mask)
                out = rounded(gelu(out.to(tl.float32)), dtype)
            tl.store(out_ptr + at, out, mask=mask)


@launched
def residual_linear_kernel(
    a_ptr,  # [T, K]
    weight_ptr,  # [N, K]
    weight_scale_ptr,  # [N] fp32, or None
    bias_ptr,  # [N], or None
    gate_ptr,  # gate of sequence b at b * modulation_stride
    x_ptr,  # [T, N] fp32, the residual
    active_ptr,  # [B] int8, or None: rows of other sequences are copied
    branch_ptr,  # [T, N], or None: the branch after dropout is kept there
    start_ptr,  # [T, N] fp32, or None: the input of the loop, to measure the change against
    change_ptr,  # [2, T, tiles of columns] fp32: squares of the change and of the result
    mean_ptr,  # [T, groups], partial moments of the result
    square_ptr,
    out_ptr,  # [T, N] fp32, may be x
    num_rows,
    num_cols,
    depth,
    length,
    modulation_stride,
    dropout_seed: tl.uint64,
    application,
    dropout_threshold: tl.int64,  # 0: none
    inverse_kept,
    BRANCH: tl.constexpr,  # 0: attention, 1: MLP
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x + gate * dropout(a weight^T + bias), with the moments that the next norm needs."""
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, 8)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row_exists = row < num_rows
        col_exists = col < num_cols
        sequence = row // length
        at = row.to(tl.int64)[:, None] * num_cols + col[None, :]
        mask = row_exists[:, None] & col_exists[None, :]
        depth_used = depth
        if active_ptr is not None:
            active = tl.load(active_ptr + sequence, mask=row_exists, other=0).to(tl.int32)
            depth_used = tl.where(tl.max(active, axis=0) > 0, depth, 0)
        acc = product(
            a_ptr, depth, weight_ptr, 1, depth, row, col, num_rows, num_cols, depth_used, depth_used, BLOCK_K
        )
        acc = scaled_and_biased(acc, weight_scale_ptr, bias_ptr, col, num_cols)
        branch = rounded(acc, dtype)
        if DROPOUT:
            first_col = tile_n * BLOCK_N
            keep = dropout_keep(
                dropout_seed, application, BRANCH, dropout_threshold, row, first_col, num_cols, BLOCK_N
            )
            branch = rounded(tl.where(keep, branch.to(tl.float32) * inverse_kept, 0.0), dtype)
        if branch_ptr is not None:
            tl.store(branch_ptr + at, branch, mask=mask)
        gate_ptrs = gate_ptr + sequence.to(tl.int64)[:, None] * modulation_stride + col[None, :]
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        new = x + rounded(gate * branch.to(tl.float32), dtype).to(tl.float32)
        if active_ptr is not None:
            new = tl.where((active > 0)[:, None], new, x)
        tl.store(out_ptr + at, new, mask=mask)
        store_moments(new, mean_ptr, square_ptr, row, num_rows, tile_n * BLOCK_N, num_cols)
        if start_ptr is not None:
            change = tl.where(mask, new - tl.load(start_ptr + at, mask=mask, other=0.0), 0.0)
            size = tl.where(mask, new, 0.0)
            at_part = row.to(tl.int64) * tiles_n + tile_n
            tl.store(change_ptr + at_part, tl.sum(change * change, axis=1), mask=row_exists)
            at_part += tl.cast(num_rows, tl.int64) * tiles_n
            tl.store(change_ptr + at_part, tl.sum(size * size, axis=1), mask=row_exists)


@launched
def row_moments_kernel(
    x_ptr,  # [T, D] fp32
    mean_ptr,  # [T, groups]
    square_ptr,  # [T, groups]
    num_rows,
    size,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The partial moments of every row, as the products with a residual leave them behind."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    exists = (row < num_rows)[:, None] & (col < size)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * size + col[None, :], mask=exists, other=0.0)
    store_moments(x, mean_ptr, square_ptr, row, num_rows, 0, size)


@launched
def exit_kernel(
    change_ptr,  # [2, T, tiles_n] fp32: squares of the change and of the result, or None
    limit_ptr,  # [B] int64: loops allowed
    active_ptr,  # [B] int8, updated
    used_ptr,  # [B] int64, updated
    num_rows,
    length,
    tiles_n,
    threshold,
    BLOCK: tl.constexpr,
):
    """After a loop: counts it, and ends the sequences that have reached their limit or changed little."""
    sequence = tl.program_id(0).to(tl.int64)
    active = tl.load(active_ptr + sequence).to(tl.int64)
    used = tl.load(used_ptr + sequence) + active
    going = (active > 0) & (used < tl.load(limit_ptr + sequence))
    if change_ptr is not None:
        count = tl.cast(length, tl.int64) * tiles_n
        change = tl.zeros((BLOCK,), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            at = change_ptr + sequence * count + i
            change += tl.load(at, mask=i < count, other=0.0)
            square += tl.load(at + tl.cast(num_rows, tl.int64) * tiles_n, mask=i < count, other=0.0)
        relative = tl.sqrt(tl.sum(change, axis=0)) / tl.sqrt(tl.sum(square, axis=0))
        going = going & ((relative < threshold) == 0)
    tl.store(used_ptr + sequence, used)
    tl.store(active_ptr + sequence, going.to(tl.int8))
