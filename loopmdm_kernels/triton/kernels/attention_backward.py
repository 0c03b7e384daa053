"""Gradients of attention: those of queries, and with the roles exchanged those of keys and values."""

import triton
import triton.language as tl

from loopmdm_kernels.triton.kernels.attention import (
    LOG2_E,
    allowed_keys,
    head_offset,
    load_angles,
    load_halves,
    load_rows,
    scores,
)
from loopmdm_kernels.triton.kernels.common import dot, launched, rounded


@triton.jit
def store_halves(
    ptr, row_stride, position, length, first, second, cos_ptr, sin_ptr, half, head_dim, HALF: tl.constexpr
):
    """The gradient of rotated rows, turned back and stored."""
    if cos_ptr is not None:
        cos, sin = load_angles(cos_ptr, sin_ptr, position, length, half, HALF)
        turned = first * cos + second * sin
        second = second * cos - first * sin
        first = turned
    col = tl.arange(0, HALF)
    row_exists = (position < length)[:, None]
    at = ptr + position.to(tl.int64)[:, None] * row_stride + col[None, :]
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(at, rounded(first, dtype), mask=row_exists & (col < half)[None, :])
    tl.store(at + half, rounded(second, dtype), mask=row_exists & (col < head_dim - half)[None, :])


@launched
def attention_gradient_kernel(
    own_ptr,  # q or, OF_KEYS, k; each tensor has strides of its own
    own_value_ptr,  # gradient of out, or v
    other_ptr,  # k, or q
    other_value_ptr,  # v, or gradient of out
    mask_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,  # OF_KEYS: None
    rest_ptr,  # what rounding took from out, with its strides, or None
    log_sum_exp_ptr,
    inner_ptr,  # [B, H, L] fp32: out . grad of each query, left for the gradients OF_KEYS
    grad_ptr,  # of q, or of k
    grad_value_ptr,  # None, or of v
    own_sequence,
    own_head,
    own_row,
    own_value_sequence,
    own_value_head,
    own_value_row,
    other_sequence,
    other_head,
    other_row,
    other_value_sequence,
    other_value_head,
    other_value_row,
    out_sequence,
    out_head,
    out_row,
    grad_sequence,
    grad_head,
    grad_row,
    grad_value_sequence,
    grad_value_head,
    grad_value_row,
    heads,
    length,
    half,
    head_dim,
    scale,
    OF_KEYS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of BLOCK_M queries, with BLOCK_N keys at a time; or of keys, with queries. Makes the scores again."""
    ACROSS: tl.constexpr = 0 if OF_KEYS else 1  # the axis of scores that queries do not lie along
    blocks = tl.cdiv(length, BLOCK_M)
    index = tl.program_id(0) // blocks
    sequence, head = index // heads, index % heads
    own = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_ptr += head_offset(sequence, head, own_sequence, own_head)
    own_value_ptr += head_offset(sequence, head, own_value_sequence, own_value_head)
    other_ptr += head_offset(sequence, head, other_sequence, other_head)
    other_value_ptr += head_offset(sequence, head, other_value_sequence, other_value_head)
    grad_ptr += head_offset(sequence, head, grad_sequence, grad_head)
    if OF_KEYS:
        grad_value_ptr += head_offset(sequence, head, grad_value_sequence, grad_value_head)
    else:
        out_ptr += head_offset(sequence, head, out_sequence, out_head)
    log_sum_exp_ptr += tl.cast(index, tl.int64) * length
    inner_ptr += tl.cast(index, tl.int64) * length
    own1, own2 = load_halves(own_ptr, own_row, own, length, cos_ptr, sin_ptr, half, head_dim, HALF)
    own_value = load_rows(own_value_ptr, own_value_row, own, length, head_dim, BLOCK_K)
    if OF_KEYS:
        allowed = allowed_keys(mask_ptr, sequence, own, length)
    else:
        out = load_rows(out_ptr, out_row, own, length, head_dim, BLOCK_K).to(tl.float32)
        if rest_ptr is not None:
            rest_ptr += head_offset(sequence, head, out_sequence, out_head)
            out += load_rows(rest_ptr, out_row, own, length, head_dim, BLOCK_K).to(tl.float32)
        inner = tl.sum(out * own_value.to(tl.float32), axis=1)
        tl.store(inner_ptr + own, inner, mask=own < length)
        log_sum_exp = tl.load(log_sum_exp_ptr + own, mask=own < length, other=float("inf"))
    grad1 = tl.zeros((BLOCK_M, HALF), tl.float32)
    grad2 = tl.zeros((BLOCK_M, HALF), tl.float32)
    grad_value = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, length, BLOCK_N):
        other = first + tl.arange(0, BLOCK_N)
        other1, other2 = load_halves(
            other_ptr, other_row, other, length, cos_ptr, sin_ptr, half, head_dim, HALF
        )
        other_value = load_rows(other_value_ptr, other_value_row, other, length, head_dim, BLOCK_K)
        if OF_KEYS:
            log_sum_exp = tl.load(log_sum_exp_ptr + other, mask=other < length, other=float("inf"))
            inner = tl.load(inner_ptr + other, mask=other < length, other=0.0)
        s = scores(own1, own2, other1, other2) * (scale * LOG2_E)
        if not OF_KEYS:
            allowed = allowed_keys(mask_ptr, sequence, other, length)
        s = tl.where(tl.expand_dims(allowed, 1 - ACROSS), s, -float("inf"))
        p = tl.exp2(s - tl.expand_dims(log_sum_exp, ACROSS))
        if OF_KEYS:
            grad_value = dot(rounded(p, other_value.dtype), other_value, grad_value)
        grad_p = dot(own_value, tl.trans(other_value), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        grad_s = rounded(p * (grad_p - tl.expand_dims(inner, ACROSS)) * scale, other1.dtype)
        grad1 = dot(grad_s, other1, grad1)
        grad2 = dot(grad_s, other2, grad2)
    store_halves(grad_ptr, grad_row, own, length, grad1, grad2, cos_ptr, sin_ptr, half, head_dim, HALF)
    if OF_KEYS:
        col = tl.arange(0, BLOCK_K)
        at = grad_value_ptr + own.to(tl.int64)[:, None] * grad_value_row + col[None, :]
        exists = (own < length)[:, None] & (col < head_dim)[None, :]
        tl.store(at, rounded(grad_value, grad_value_ptr.dtype.element_ty), mask=exists)
