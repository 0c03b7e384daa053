"""Gradients of attention: one kernel by blocks of queries, one of keys; both make the scores again."""

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
from loopmdm_kernels.triton.kernels.common import dot, rounded


@triton.jit
def store_halves(
    ptr,
    row_stride,
    position,
    length,
    first,
    second,
    cos_ptr,
    sin_ptr,
    half,
    head_dim,
    HALF: tl.constexpr,
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


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rest_ptr,  # what rounding took from out, with its strides, or None
    grad_ptr,  # gradient of out, with strides of its own
    log_sum_exp_ptr,
    inner_ptr,  # [B, H, L] fp32: out . grad of each row, left for the other kernel
    grad_q_ptr,
    q_sequence,
    q_head,
    q_row,
    k_sequence,
    k_head,
    k_row,
    v_sequence,
    v_head,
    v_row,
    out_sequence,
    out_head,
    out_row,
    grad_sequence,
    grad_head,
    grad_row,
    grad_q_sequence,
    grad_q_head,
    grad_q_row,
    heads,
    length,
    half,
    head_dim,
    scale,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(length, BLOCK_M)
    index = tl.program_id(0) // blocks
    sequence, head = index // heads, index % heads
    query = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += head_offset(sequence, head, q_sequence, q_head)
    k_ptr += head_offset(sequence, head, k_sequence, k_head)
    v_ptr += head_offset(sequence, head, v_sequence, v_head)
    out_ptr += head_offset(sequence, head, out_sequence, out_head)
    grad_ptr += head_offset(sequence, head, grad_sequence, grad_head)
    grad_q_ptr += head_offset(sequence, head, grad_q_sequence, grad_q_head)
    q1, q2 = load_halves(q_ptr, q_row, query, length, cos_ptr, sin_ptr, half, head_dim, HALF)
    grad = load_rows(grad_ptr, grad_row, query, length, head_dim, BLOCK_K)
    out = load_rows(out_ptr, out_row, query, length, head_dim, BLOCK_K).to(tl.float32)
    if rest_ptr is not None:
        rest_ptr += head_offset(sequence, head, out_sequence, out_head)
        out += load_rows(rest_ptr, out_row, query, length, head_dim, BLOCK_K).to(tl.float32)
    inner = tl.sum(out * grad.to(tl.float32), axis=1)
    at_row = tl.cast(index, tl.int64) * length + query
    tl.store(inner_ptr + at_row, inner, mask=query < length)
    log_sum_exp = tl.load(log_sum_exp_ptr + at_row, mask=query < length, other=float("inf"))
    grad1 = tl.zeros((BLOCK_M, HALF), tl.float32)
    grad2 = tl.zeros((BLOCK_M, HALF), tl.float32)
    for first in range(0, length, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k1, k2 = load_halves(k_ptr, k_row, key, length, cos_ptr, sin_ptr, half, head_dim, HALF)
        v = load_rows(v_ptr, v_row, key, length, head_dim, BLOCK_K)
        s = scores(q1, q2, k1, k2, BLOCK_M, BLOCK_N) * (scale * LOG2_E)
        s = tl.where(allowed_keys(mask_ptr, sequence, key, length)[None, :], s, -float("inf"))
        p = tl.exp2(s - log_sum_exp[:, None])
        grad_p = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        grad_s = rounded(p * (grad_p - inner[:, None]) * scale, k1.dtype)
        grad1 = dot(grad_s, k1, grad1)
        grad2 = dot(grad_s, k2, grad2)
    store_halves(grad_q_ptr, grad_q_row, query, length, grad1, grad2, cos_ptr, sin_ptr, half, head_dim, HALF)


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    cos_ptr,
    sin_ptr,
    grad_ptr,
    log_sum_exp_ptr,
    inner_ptr,
    grad_k_ptr,
    grad_v_ptr,
    q_sequence,
    q_head,
    q_row,
    k_sequence,
    k_head,
    k_row,
    v_sequence,
    v_head,
    v_row,
    grad_sequence,
    grad_head,
    grad_row,
    grad_k_sequence,
    grad_k_head,
    grad_k_row,
    grad_v_sequence,
    grad_v_head,
    grad_v_row,
    heads,
    length,
    half,
    head_dim,
    scale,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M keys, with BLOCK_N queries at a time; products are transposed to those of the other kernel."""
    blocks = tl.cdiv(length, BLOCK_M)
    index = tl.program_id(0) // blocks
    sequence, head = index // heads, index % heads
    key = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += head_offset(sequence, head, q_sequence, q_head)
    k_ptr += head_offset(sequence, head, k_sequence, k_head)
    v_ptr += head_offset(sequence, head, v_sequence, v_head)
    grad_ptr += head_offset(sequence, head, grad_sequence, grad_head)
    grad_k_ptr += head_offset(sequence, head, grad_k_sequence, grad_k_head)
    grad_v_ptr += head_offset(sequence, head, grad_v_sequence, grad_v_head)
    log_sum_exp_ptr += tl.cast(index, tl.int64) * length
    inner_ptr += tl.cast(index, tl.int64) * length
    k1, k2 = load_halves(k_ptr, k_row, key, length, cos_ptr, sin_ptr, half, head_dim, HALF)
    v = load_rows(v_ptr, v_row, key, length, head_dim, BLOCK_K)
    allowed = allowed_keys(mask_ptr, sequence, key, length)
    grad1 = tl.zeros((BLOCK_M, HALF), tl.float32)
    grad2 = tl.zeros((BLOCK_M, HALF), tl.float32)
    grad_v = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, length, BLOCK_N):
        query = first + tl.arange(0, BLOCK_N)
        q1, q2 = load_halves(q_ptr, q_row, query, length, cos_ptr, sin_ptr, half, head_dim, HALF)
        grad = load_rows(grad_ptr, grad_row, query, length, head_dim, BLOCK_K)
        log_sum_exp = tl.load(log_sum_exp_ptr + query, mask=query < length, other=float("inf"))
        inner = tl.load(inner_ptr + query, mask=query < length, other=0.0)
        s = scores(k1, k2, q1, q2, BLOCK_M, BLOCK_N) * (scale * LOG2_E)
        p = tl.exp2(tl.where(allowed[:, None], s, -float("inf")) - log_sum_exp[None, :])
        grad_v = dot(rounded(p, grad.dtype), grad, grad_v)
        grad_p = dot(v, tl.trans(grad), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        grad_s = rounded(p * (grad_p - inner[None, :]) * scale, q1.dtype)
        grad1 = dot(grad_s, q1, grad1)
        grad2 = dot(grad_s, q2, grad2)
    store_halves(grad_k_ptr, grad_k_row, key, length, grad1, grad2, cos_ptr, sin_ptr, half, head_dim, HALF)
    col = tl.arange(0, BLOCK_K)
    at = grad_v_ptr + key.to(tl.int64)[:, None] * grad_v_row + col[None, :]
    exists = (key < length)[:, None] & (col < head_dim)[None, :]
    tl.store(at, rounded(grad_v, grad_v_ptr.dtype.element_ty), mask=exists)
