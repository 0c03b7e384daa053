"""Bidirectional attention with rotary positions: one program a block of queries, scores stay in registers.

Queries and keys are loaded as two halves of the head size, which is what the rotation mixes; scores are the
sum of the products of the halves.
"""

import triton
import triton.language as tl

from loopmdm_kernels.triton.kernels.common import LOWEST, dot, launched, rounded

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_halves(
    ptr,
    row_stride,
    position,
    length,
    cos_ptr,  # [L, K / 2] in the dtype of ptr, or None: no rotation
    sin_ptr,
    half,
    head_dim,
    HALF: tl.constexpr,
):
    """Rows `position` of [L, K] rotated, as two halves [rows, HALF]; 0 where there is nothing."""
    col = tl.arange(0, HALF)
    row_exists = (position < length)[:, None]
    at = ptr + position.to(tl.int64)[:, None] * row_stride + col[None, :]
    first = tl.load(at, mask=row_exists & (col < half)[None, :], other=0.0)
    second = tl.load(at + half, mask=row_exists & (col < head_dim - half)[None, :], other=0.0)
    if cos_ptr is not None:
        cos, sin = load_angles(cos_ptr, sin_ptr, position, length, half, HALF)
        x1, x2 = first.to(tl.float32), second.to(tl.float32)
        first = rounded(x1 * cos - x2 * sin, first.dtype)
        second = rounded(x2 * cos + x1 * sin, second.dtype)
    return first, second


@triton.jit
def load_angles(cos_ptr, sin_ptr, position, length, half, HALF: tl.constexpr):
    col = tl.arange(0, HALF)
    at = position[:, None] * half + col[None, :]  # 32 bits: wider offsets are spilled
    exists = (position < length)[:, None] & (col < half)[None, :]
    cos = tl.load(cos_ptr + at, mask=exists, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_rows(ptr, row_stride, position, length, head_dim, BLOCK_K: tl.constexpr):
    col = tl.arange(0, BLOCK_K)
    exists = (position < length)[:, None] & (col < head_dim)[None, :]
    return tl.load(ptr + position.to(tl.int64)[:, None] * row_stride + col[None, :], mask=exists, other=0.0)


@triton.jit
def allowed_keys(mask_ptr, sequence, key, length):
    """Which of the keys exist and may be attended."""
    allowed = key < length
    if mask_ptr is not None:
        at = mask_ptr + tl.cast(sequence, tl.int64) * length + key
        allowed &= tl.load(at, mask=key < length, other=0) != 0
    return allowed


@triton.jit
def head_offset(sequence, head, sequence_stride, head_stride):
    return tl.cast(sequence, tl.int64) * sequence_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def scores(a1, a2, b1, b2):
    """a b^T from halves."""
    acc = dot(a1, tl.trans(b1), tl.zeros((a1.shape[0], b1.shape[0]), tl.float32))
    return dot(a2, tl.trans(b2), acc)


@launched
def attention_kernel(
    q_ptr,  # element (b, h, l, k) at b, h, l times their strides + k; so k, v and out
    k_ptr,
    v_ptr,
    mask_ptr,  # [B, L] uint8, or None
    active_ptr,  # [B] int8, or None: what other sequences get is of no use
    cos_ptr,
    sin_ptr,
    out_ptr,
    rest_ptr,  # what rounding took from out, with its strides, or None
    log_sum_exp_ptr,  # [B, H, L] fp32, to base 2
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
    index = tl.program_id(0) // blocks  # of the head
    sequence, head = index // heads, index % heads
    query = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += head_offset(sequence, head, q_sequence, q_head)
    k_ptr += head_offset(sequence, head, k_sequence, k_head)
    v_ptr += head_offset(sequence, head, v_sequence, v_head)
    out_ptr += head_offset(sequence, head, out_sequence, out_head)
    q1, q2 = load_halves(q_ptr, q_row, query, length, cos_ptr, sin_ptr, half, head_dim, HALF)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    keys = length
    if active_ptr is not None:
        keys = tl.where(tl.load(active_ptr + sequence) > 0, length, 0)
    for first in range(0, keys, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k1, k2 = load_halves(k_ptr, k_row, key, length, cos_ptr, sin_ptr, half, head_dim, HALF)
        v = load_rows(v_ptr, v_row, key, length, head_dim, BLOCK_K)
        s = scores(q1, q2, k1, k2) * (scale * LOG2_E)
        s = tl.where(allowed_keys(mask_ptr, sequence, key, length)[None, :], s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, axis=1)
        acc = dot(rounded(p, v.dtype), v, acc * decay[:, None])
        top = higher
    col = tl.arange(0, BLOCK_K)
    exists = (query < length)[:, None] & (col < head_dim)[None, :]
    at = query.to(tl.int64)[:, None] * out_row + col[None, :]
    exact = acc / total[:, None]
    out = rounded(exact, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=exists)
    if rest_ptr is not None:
        rest_ptr += head_offset(sequence, head, out_sequence, out_head)
        tl.store(rest_ptr + at, rounded(exact - out.to(tl.float32), out.dtype), mask=exists)
    at = log_sum_exp_ptr + tl.cast(index, tl.int64) * length + query
    tl.store(at, top + tl.log2(total), mask=query < length)
