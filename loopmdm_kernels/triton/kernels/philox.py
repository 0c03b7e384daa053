"""Philox4x32-10 with the bits of `loopmdm_kernels/philox.py`, and what is drawn from it."""

import triton
import triton.language as tl

REFINE_BIT = tl.constexpr(1 << 31)
DROPOUT_STREAM = tl.constexpr(1 << 31)
REFINE_BELOW = tl.constexpr(256)


@triton.jit
def philox4x32(seed, c0, c1, c2, c3):
    """Four words for the counter (c0, c1, c2, c3), uint32 tensors of one shape; `seed` is uint64."""
    seed = tl.cast(seed, tl.uint64)
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(seed, c0, c1, c2, c3):
    """The words of counters [rows, cols / 4] side by side: [rows, cols]."""
    w0, w1, w2, w3 = philox4x32(seed, c0, c1, c2, c3)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (c3.shape[0], 4 * c3.shape[1]))


@triton.jit
def race_times(seed, sequence, step, position, first_token, valid, COLS: tl.constexpr):
    """Standard exponential variates [rows, COLS] of tokens first_token .. first_token + COLS.

    The names are uint32 [rows], first_token is a multiple of 4. Small variates have 64 random bits.
    """
    zero = tl.zeros((sequence.shape[0], COLS // 4), tl.uint32)
    group = zero + (first_token // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    c1 = zero + position[:, None]
    c2 = zero + step[:, None]
    c3 = zero + sequence[:, None]
    high = words(seed, group, c1, c2, c3)
    uniform = (high.to(tl.float32) + 0.5) * (0.5**32)
    small = (high < REFINE_BELOW) & valid
    if tl.sum(tl.sum(small.to(tl.int32), axis=1), axis=0) > 0:  # once in 2^24 words
        low = words(seed, group | REFINE_BIT, c1, c2, c3)
        refined = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * (0.5**32)) * (0.5**32)
        uniform = tl.where(small, refined, uniform)
    return minus_log1m(uniform)


@triton.jit
def minus_log1m(u):
    """-log(1 - u) for u in (0, 1] without losing small u: the rounding of 1 - u is divided out (Kahan)."""
    w = 1.0 - u
    lost = 1.0 - w
    exact = -tl.log(w) * (u / tl.where(lost > 0.0, lost, 1.0))
    return tl.where(lost > 0.0, exact, u)


@triton.jit
def dropout_keep(seed, application, branch, threshold, rows, first_col, row_size, COLS: tl.constexpr):
    """Mask [rows, COLS] of the elements kept: random words not below `threshold`. row_size % 4 == 0."""
    zero = tl.zeros((rows.shape[0], COLS // 4), tl.uint32)
    first = rows.to(tl.int64)[:, None] * row_size + first_col
    group = first // 4 + tl.arange(0, COLS // 4).to(tl.int64)[None, :]
    c2 = zero + (tl.cast(application, tl.uint32) | DROPOUT_STREAM)
    c3 = zero + branch
    bits = words(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), c2, c3)
    return bits.to(tl.int64) >= threshold
