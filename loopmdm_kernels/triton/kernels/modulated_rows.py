"""Rows that go through a layer norm with modulation, and their gradients."""

import triton
import triton.language as tl

from loopmdm_kernels.triton.kernels.common import gain, launched, one_plus, rounded, row_moments


@launched
def modulated_rows_kernel(
    hidden_ptr,  # [T, D] fp32
    rows_ptr,  # [R] int64
    norm_ptr,  # [D]
    modulation_ptr,  # [M, 2, D]
    out_ptr,  # [R, D]
    num_rows,
    size,
    length,
    modulation_stride,  # 0: one modulation for all sequences
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    row_exists = row < num_rows
    col_exists = (col < size)[None, :]
    exists = row_exists[:, None] & col_exists
    token = tl.load(rows_ptr + row, mask=row_exists, other=0)
    x = tl.load(hidden_ptr + token[:, None] * size + col[None, :], mask=exists, other=0.0)
    mean, deviation = row_moments(x, exists, size)
    shift_ptr = modulation_ptr + (token // length)[:, None] * modulation_stride + col[None, :]
    shift = tl.load(shift_ptr, mask=exists, other=0.0)
    scale = tl.load(shift_ptr + size, mask=exists, other=0.0)
    norm = tl.load(norm_ptr + col, mask=col < size, other=0.0)[None, :]
    h = (x - mean[:, None]) * deviation[:, None] * gain(norm, scale) + shift.to(tl.float32)
    out = out_ptr + row.to(tl.int64)[:, None] * size + col[None, :]
    tl.store(out, rounded(h, out_ptr.dtype.element_ty), mask=exists)


@launched
def modulated_rows_backward_kernel(
    hidden_ptr,  # [T, D] fp32
    rows_ptr,  # [R] int64, or None: row b L + l of sequence b
    norm_ptr,
    modulation_ptr,  # shift of sequence b at b * modulation_stride, scale D further
    grad_ptr,  # [R, D] fp32, of the modulated rows
    grad_hidden_ptr,  # [T, D] fp32, added to
    grad_norm_ptr,  # [M or B, parts, D] fp32, partial sums over rows, added to
    grad_shift_ptr,
    grad_scale_ptr,
    num_rows,  # of the list, or of a sequence
    size,
    length,
    modulation_stride,
    PART: tl.constexpr,  # rows a program looks at
    HAS_ROWS: tl.constexpr,
    OWN_ROWS: tl.constexpr,  # HAS_ROWS: take the rows of its sequence only
    BLOCK_D: tl.constexpr,
):
    parts = tl.maximum(tl.cdiv(num_rows, PART), 1)
    sequence = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    col = tl.arange(0, BLOCK_D)
    col_exists = col < size
    norm = tl.load(norm_ptr + col, mask=col_exists, other=0.0).to(tl.float32)
    scale = tl.load(modulation_ptr + sequence * modulation_stride + size + col, mask=col_exists, other=0.0)
    gains = gain(norm, scale)
    sum_product = tl.zeros((BLOCK_D,), tl.float32)  # of gradient times normalised row
    sum_grad = tl.zeros((BLOCK_D,), tl.float32)
    first = part * PART
    for i in range(first, tl.minimum(first + PART, num_rows)):
        if HAS_ROWS:
            token = tl.load(rows_ptr + i)
            at = tl.cast(i, tl.int64)
        else:
            token = sequence * length + i
            at = token
        mine = True
        if OWN_ROWS:
            mine = token // length == sequence
        if mine:
            x = tl.load(hidden_ptr + token * size + col, mask=col_exists, other=0.0)
            grad = tl.load(grad_ptr + at * size + col, mask=col_exists, other=0.0)
            mean, deviation = row_moments(x[None, :], col_exists[None, :], size)
            mean = tl.sum(mean, axis=0)
            deviation = tl.sum(deviation, axis=0)
            normalised = tl.where(col_exists, (x - mean) * deviation, 0.0)
            sum_product += grad * normalised
            sum_grad += grad
            inner = grad * gains
            of_mean = tl.sum(inner, axis=0) / size
            of_deviation = tl.sum(inner * normalised, axis=0) / size
            into = (inner - of_mean - normalised * of_deviation) * deviation
            out = grad_hidden_ptr + token * size + col
            if HAS_ROWS:  # a row may be listed twice
                tl.atomic_add(out, into, mask=col_exists)
            else:
                into += tl.load(out, mask=col_exists, other=0.0)
                tl.store(out, into, mask=col_exists)
    at_sum = (sequence * parts + part) * size + col
    factor = one_plus(scale)
    add_to(grad_norm_ptr + at_sum, sum_product * factor, col_exists)
    add_to(grad_shift_ptr + at_sum, sum_grad, col_exists)
    add_to(grad_scale_ptr + at_sum, sum_product * norm, col_exists)


@triton.jit
def add_to(ptrs, value, mask):
    """For sums that only this program adds to."""
    tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + value, mask=mask)
