"""`sample_rows`: the race and the statistics of a row, by chunks of the vocabulary, then of all chunks."""

import triton
import triton.language as tl

from loopmdm_kernels.triton.kernels.common import LOWEST, launched
from loopmdm_kernels.triton.kernels.logits import results_of_chunks, walk_chunk
from loopmdm_kernels.triton.kernels.philox import race_times


@triton.jit
def sampled(state, raw, possible, first, race_of):
    """The statistics and the winner of each row, with those of a tile of logits."""
    total, weighted, top1, top2, top1_token, race, race_logit, race_token = state
    seed, sequence, step, position, inverse_temperature, RACE = race_of
    column = tl.arange(0, raw.shape[1])[None, :]
    logits = tl.where(raw == raw, raw, -float("inf"))  # NaN wins nothing, but stays in the sums
    best, best_at = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
    second = tl.max(tl.where(column == best_at[:, None], -float("inf"), logits), axis=1)
    top = tl.maximum(top1, best)
    rest = raw - top[:, None]
    exponential = tl.exp(rest)
    fall = top1 - top
    decay = tl.exp(fall)
    weighted = (weighted + total * fall) * decay
    weighted += tl.sum(tl.where(exponential > 0.0, exponential * rest, exponential), axis=1)
    total = total * decay + tl.sum(exponential, axis=1)
    top2 = tl.maximum(tl.minimum(top1, best), tl.maximum(top2, second))
    top1_token = tl.where(best > top1, first + best_at, top1_token)
    if RACE:
        times = race_times(seed, sequence, step, position, first, possible, raw.shape[1])
        score = tl.where(logits > -float("inf"), logits * inverse_temperature - tl.log(times), logits)
        win, win_at = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        win_logit = tl.max(tl.where(column == win_at[:, None], logits, -float("inf")), axis=1)
        wins = win > race
        race_token = tl.where(wins, first + win_at, race_token)
        race_logit = tl.where(wins, win_logit, race_logit)
        race = tl.where(wins, win, race)
    return total, weighted, top, top2, top1_token, race, race_logit, race_token


@launched
def sample_rows_kernel(
    h_ptr,  # [R, D]
    weight_ptr,  # [V, D]
    weight_scale_ptr,  # [V] fp32, or None
    bias_ptr,  # [V]
    sequence_ptr,  # [R] int64, as step and position
    step_ptr,
    position_ptr,
    numbers_ptr,  # [6, R, chunks] fp32: sum, weighted sum, top1, top2, race score and logit
    tokens_ptr,  # [2, R, chunks] int32: most probable, drawn
    num_rows,
    vocab_size,
    size,
    excluded_token,
    seed: tl.uint64,
    inverse_temperature,
    RACE: tl.constexpr,  # False: temperature 0
    CHUNK: tl.constexpr,  # tokens of a program
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1)
    row_exists = row < num_rows
    sequence = tl.load(sequence_ptr + row, mask=row_exists, other=0).to(tl.uint32)
    step = tl.load(step_ptr + row, mask=row_exists, other=0).to(tl.uint32)
    position = tl.load(position_ptr + row, mask=row_exists, other=0).to(tl.uint32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    top1 = tl.full((BLOCK_M,), LOWEST, tl.float32)
    top2 = tl.full((BLOCK_M,), LOWEST, tl.float32)
    top1_token = tl.full((BLOCK_M,), -1, tl.int32)
    race = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    race_logit = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    race_token = tl.full((BLOCK_M,), -1, tl.int32)
    head = (weight_ptr, weight_scale_ptr, bias_ptr, vocab_size, size, excluded_token)
    state = (total, weighted, top1, top2, top1_token, race, race_logit, race_token)
    race_of = (seed, sequence, step, position, inverse_temperature, RACE)
    state = walk_chunk(sampled, state, race_of, h_ptr, head, row, num_rows, CHUNK, BLOCK_V, BLOCK_K)
    total, weighted, top1, top2, top1_token, race, race_logit, race_token = state
    chunks = tl.num_programs(1)
    at = row.to(tl.int64) * chunks + chunk
    field = tl.cast(num_rows, tl.int64) * chunks
    tl.store(numbers_ptr + at, total, mask=row_exists)
    tl.store(numbers_ptr + field + at, weighted, mask=row_exists)
    tl.store(numbers_ptr + 2 * field + at, top1, mask=row_exists)
    tl.store(numbers_ptr + 3 * field + at, top2, mask=row_exists)
    tl.store(tokens_ptr + at, top1_token, mask=row_exists)
    if RACE:
        tl.store(numbers_ptr + 4 * field + at, race, mask=row_exists)
        tl.store(numbers_ptr + 5 * field + at, race_logit, mask=row_exists)
        tl.store(tokens_ptr + field + at, race_token, mask=row_exists)


@triton.jit
def best_chunk(value, token, chunk, CHUNKS: tl.constexpr):
    """Of each row: the largest value, the first chunk that has it, and the token there."""
    best, at = tl.max(value, axis=1, return_indices=True, return_indices_tie_break_left=True)
    here = chunk[None, :] == at[:, None]
    return best, here, tl.sum(tl.where(here, token, 0), axis=1)


@launched
def sample_rows_combine_kernel(
    numbers_ptr,
    tokens_ptr,
    token_ptr,  # outputs [R]
    log_prob_ptr,
    top1_token_ptr,
    top1_prob_ptr,
    top2_prob_ptr,
    entropy_ptr,
    num_rows,
    chunks,
    fallback,  # token where no logit is a number
    RACE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row, chunk, exists, at = results_of_chunks(num_rows, chunks, ROWS, CHUNKS)
    row_exists = row < num_rows
    field = tl.cast(num_rows, tl.int64) * chunks
    total = tl.load(numbers_ptr + at, mask=exists, other=0.0)
    weighted = tl.load(numbers_ptr + field + at, mask=exists, other=0.0)
    top1 = tl.load(numbers_ptr + 2 * field + at, mask=exists, other=LOWEST)
    top2 = tl.load(numbers_ptr + 3 * field + at, mask=exists, other=LOWEST)
    tokens = tl.load(tokens_ptr + at, mask=exists, other=-1)
    top, here, top_token = best_chunk(top1, tokens, chunk, CHUNKS)
    second = tl.max(tl.maximum(top2, tl.where(here, LOWEST, top1)), axis=1)
    fall = top1 - top[:, None]
    decay = tl.exp(fall)
    row_total = tl.sum(total * decay, axis=1)
    row_weighted = tl.sum((weighted + total * fall) * decay, axis=1)
    log_total = tl.log(row_total)
    top_token = tl.where(top_token < 0, fallback, top_token)
    if RACE:
        race = tl.load(numbers_ptr + 4 * field + at, mask=exists, other=-float("inf"))
        logit = tl.load(numbers_ptr + 5 * field + at, mask=exists, other=-float("inf"))
        racers = tl.load(tokens_ptr + field + at, mask=exists, other=-1)
        _, winner, token = best_chunk(race, racers, chunk, CHUNKS)
        token_logit = tl.max(tl.where(winner, logit, -float("inf")), axis=1)
        token = tl.where(token < 0, fallback, token)
    else:
        token = top_token
        token_logit = top
    tl.store(token_ptr + row, token.to(tl.int64), mask=row_exists)
    tl.store(log_prob_ptr + row, token_logit - top - log_total, mask=row_exists)
    tl.store(top1_token_ptr + row, top_token.to(tl.int64), mask=row_exists)
    tl.store(top1_prob_ptr + row, 1.0 / row_total, mask=row_exists)
    tl.store(top2_prob_ptr + row, tl.exp(second - top) / row_total, mask=row_exists)
    tl.store(entropy_ptr + row, log_total - row_weighted / row_total, mask=row_exists)
