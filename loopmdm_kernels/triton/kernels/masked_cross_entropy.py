"""`masked_cross_entropy`: -log p of rows from chunks of the vocabulary; the gradients of their logits."""

import triton
import triton.language as tl

from loopmdm_kernels.triton.kernels.common import LOWEST, launched, rounded
from loopmdm_kernels.triton.kernels.logits import logits_tile, results_of_chunks, walk_chunk


@triton.jit
def summed(state, logits, possible, first, target):
    """The sum of exponentials, the largest logit it is relative to and the target's, with those of a tile."""
    total, top, target_logit = state
    token = first + tl.arange(0, logits.shape[1])
    higher = tl.maximum(top, tl.max(logits, axis=1))
    total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
    target_logit += tl.sum(tl.where(token[None, :] == target[:, None], logits, 0.0), axis=1)
    return total, higher, target_logit


@launched
def masked_cross_entropy_kernel(
    h_ptr,  # [R, D]
    weight_ptr,  # [V, D]
    weight_scale_ptr,  # [V] fp32, or None
    bias_ptr,  # [V]
    targets_ptr,  # [T] int64, read at rows
    rows_ptr,  # [R] int64
    top_ptr,  # [R, chunks] fp32
    total_ptr,  # [R, chunks] fp32: sum of exp(logit - top)
    target_logit_ptr,  # [R] fp32
    num_rows,
    vocab_size,
    size,
    excluded_token,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1)
    row_exists = row < num_rows
    target = tl.load(targets_ptr + tl.load(rows_ptr + row, mask=row_exists, other=0))
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    target_logit = tl.zeros((BLOCK_M,), tl.float32)
    head = (weight_ptr, weight_scale_ptr, bias_ptr, vocab_size, size, excluded_token)
    state = (total, top, target_logit)
    total, top, target_logit = walk_chunk(
        summed, state, target, h_ptr, head, row, num_rows, CHUNK, BLOCK_V, BLOCK_K
    )
    at = row.to(tl.int64) * tl.num_programs(1) + chunk
    tl.store(top_ptr + at, top, mask=row_exists)
    tl.store(total_ptr + at, total, mask=row_exists)
    mine = (target >= chunk * CHUNK) & (target < chunk * CHUNK + CHUNK)
    tl.store(target_logit_ptr + row, target_logit, mask=row_exists & mine)


@launched
def masked_cross_entropy_combine_kernel(
    top_ptr,
    total_ptr,
    target_logit_ptr,
    nll_ptr,  # [R]
    log_sum_exp_ptr,  # [2, R]: the largest logit, and the log of the sum relative to it
    num_rows,
    chunks,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row, _, exists, at = results_of_chunks(num_rows, chunks, ROWS, CHUNKS)
    row_exists = row < num_rows
    tops = tl.load(top_ptr + at, mask=exists, other=LOWEST)
    totals = tl.load(total_ptr + at, mask=exists, other=0.0)
    top = tl.max(tops, axis=1)
    log_total = tl.log(tl.sum(totals * tl.exp(tops - top[:, None]), axis=1))
    target_logit = tl.load(target_logit_ptr + row, mask=row_exists, other=0.0)
    tl.store(nll_ptr + row, log_total + (top - target_logit), mask=row_exists)
    tl.store(log_sum_exp_ptr + row, top, mask=row_exists)
    tl.store(log_sum_exp_ptr + num_rows + row, log_total, mask=row_exists)


@launched
def masked_cross_entropy_backward_kernel(
    h_ptr,  # [R, D]
    weight_ptr,
    bias_ptr,
    targets_ptr,
    rows_ptr,
    top_ptr,  # [R] fp32, and the log of the sum relative to it
    log_total_ptr,
    grad_ptr,  # [R] fp32: gradient of the row's -log p
    scale_ptr,  # [1] fp32, a power of two: what is stored is relative to it
    out_ptr,  # [R, padded V] in the dtype of h; columns beyond V get 0
    num_rows,
    vocab_size,
    padded_size,
    size,
    excluded_token,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_exists = row < num_rows
    target = tl.load(targets_ptr + tl.load(rows_ptr + row, mask=row_exists, other=0))
    top = tl.load(top_ptr + row, mask=row_exists, other=0.0)
    log_total = tl.load(log_total_ptr + row, mask=row_exists, other=0.0)
    grad = tl.load(grad_ptr + row, mask=row_exists, other=0.0) / tl.load(scale_ptr)
    head = (weight_ptr, None, bias_ptr, vocab_size, size, excluded_token)
    logits, possible = logits_tile(h_ptr, head, row, token, num_rows, BLOCK_K)
    probability = tl.exp(logits - top[:, None] - log_total[:, None])
    hit = (token[None, :] == target[:, None]).to(tl.float32)
    value = tl.where(possible, (probability - hit) * grad[:, None], 0.0)
    out = out_ptr + row.to(tl.int64)[:, None] * padded_size + token[None, :]
    mask = row_exists[:, None] & (token < padded_size)[None, :]
    tl.store(out, rounded(value, out_ptr.dtype.element_ty), mask=mask)
