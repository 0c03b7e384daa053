"""Logits of the vocabulary head: a tile of them, and the walk over a chunk of tokens, which stores none."""

import triton
import triton.language as tl

from loopmdm_kernels.triton.kernels.common import product, scaled_and_biased


@triton.jit
def logits_tile(h_ptr, head, row, token, num_rows, BLOCK_K: tl.constexpr):
    """Logits [rows, tokens], -inf where there is no token to draw, and where there is one.

    head: weight [V, D], its scale [V] fp32 or None, bias [V]; V, D and the excluded token.
    """
    weight_ptr, weight_scale_ptr, bias_ptr, vocab_size, size, excluded_token = head
    acc = product(h_ptr, size, weight_ptr, 1, size, row, token, num_rows, vocab_size, size, size, BLOCK_K)
    acc = scaled_and_biased(acc, weight_scale_ptr, bias_ptr, token, vocab_size)
    possible = ((token < vocab_size) & (token != excluded_token))[None, :]
    return tl.where(possible, acc, -float("inf")), possible


@triton.jit
def walk_chunk(
    fold: tl.constexpr,
    state,
    more,
    h_ptr,
    head,
    row,
    num_rows,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """state = fold(state, logits, possible, first token, more) for each tile of this program's tokens."""
    start = tl.program_id(1) * CHUNK
    for first in range(start, tl.minimum(start + CHUNK, head[3]), BLOCK_V):
        token = first + tl.arange(0, BLOCK_V)
        logits, possible = logits_tile(h_ptr, head, row, token, num_rows, BLOCK_K)
        state = fold(state, logits, possible, first, more)
    return state


@triton.jit
def results_of_chunks(num_rows, chunks, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows of this program and all chunks; which results [R, chunks] there are, and where."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.arange(0, CHUNKS)
    exists = (row < num_rows)[:, None] & (chunk < chunks)[None, :]
    return row, chunk, exists, row.to(tl.int64)[:, None] * chunks + chunk[None, :]
