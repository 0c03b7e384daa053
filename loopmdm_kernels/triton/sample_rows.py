"""`sample_rows` in Triton: the race and the statistics of a row in one pass over the vocabulary, no logits.

Only top_p and top_k need a row's logits together; they are made for a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.reference.sample_rows import sample_logits
from loopmdm_kernels.triton.config import tiles
from loopmdm_kernels.triton.head import chunk_of, matrix, modulated_rows, norm_of, operand, why_not
from loopmdm_kernels.triton.kernels.sample_rows import sample_rows_combine_kernel, sample_rows_kernel
from loopmdm_kernels.triton.launch import ceil_div, launch, power_of_two, processor
from loopmdm_kernels.triton.linear import linear
from loopmdm_kernels.types import Fp8Head, Head, RowRng, SampledRows

_ROWS_WITH_LOGITS = 256


def supports(*, hidden: Tensor, head: Head | Fp8Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    return why_not(hidden, head, compute_dtype)


def sample_rows(
    hidden: Tensor,
    head: Head | Fp8Head,
    rows: Tensor,
    rng: RowRng,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SampledRows:
    dtype = compute_dtype or head.weight.dtype
    weight, weight_scale = matrix(head.weight, dtype)
    bias = head.bias.detach().contiguous()
    modulation, norm = operand(head.modulation, dtype), norm_of(head)
    h = modulated_rows(hidden.detach().contiguous(), norm, modulation, rows.contiguous(), dtype)
    if temperature > 0 and (top_p < 1.0 or top_k is not None):
        parts = []
        for first in range(0, max(rows.shape[0], 1), _ROWS_WITH_LOGITS):
            part = slice(first, first + _ROWS_WITH_LOGITS)
            logits = linear(h[part], weight, bias, weight_scale=weight_scale, out_dtype=torch.float32)
            names = RowRng(rng.seed, *(name[part] for name in rng[1:]))
            parts.append(
                sample_logits(
                    logits, head.excluded_token, names, temperature=temperature, top_p=top_p, top_k=top_k
                )
            )
        return SampledRows(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    return _race(h, weight, weight_scale, bias, head.excluded_token, rng, temperature)


def _race(
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor,
    excluded_token: int,
    rng: RowRng,
    temperature: float,
) -> SampledRows:
    (num_rows, size), vocab_size = h.shape, weight.shape[0]
    tile = tiles("sample", (vocab_size, size), h.dtype, processor(h.device))
    chunks = ceil_div(vocab_size, chunk_of(tile))
    numbers = h.new_empty(6, num_rows, chunks, dtype=torch.float32)
    tokens = h.new_empty(2, num_rows, chunks, dtype=torch.int32)
    race = temperature > 0
    launch(
        sample_rows_kernel,
        (ceil_div(num_rows, tile.m), chunks),
        h,
        weight,
        weight_scale,
        bias,
        *(name.contiguous() for name in rng[1:]),
        numbers,
        tokens,
        num_rows,
        vocab_size,
        size,
        excluded_token,
        rng.seed,
        1.0 / temperature if race else 1.0,
        RACE=race,
        CHUNK=chunk_of(tile),
        BLOCK_M=tile.m,
        BLOCK_V=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    out = SampledRows(
        *(
            h.new_empty(num_rows, dtype=torch.int64 if name.endswith("token") else torch.float32)
            for name in SampledRows._fields
        )
    )
    at_once = 4
    launch(
        sample_rows_combine_kernel,
        (ceil_div(num_rows, at_once),),
        numbers,
        tokens,
        *out,
        num_rows,
        chunks,
        vocab_size - 2 if excluded_token == vocab_size - 1 else vocab_size - 1,
        RACE=race,
        ROWS=at_once,
        CHUNKS=power_of_two(chunks),
        num_warps=4,
        num_stages=1,
    )
    return out
