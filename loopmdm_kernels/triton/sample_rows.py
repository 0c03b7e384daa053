"""`sample_rows` in Triton: the race and the statistics of a row in one pass over the vocabulary, no logits.

Only top_p and top_k need a row's logits together; they are made for a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.calls import SampleCall
from loopmdm_kernels.reference.sample_rows import sample_in_parts
from loopmdm_kernels.triton.config import tiles
from loopmdm_kernels.triton.head import chunk_of, modulated_rows, why_not
from loopmdm_kernels.triton.kernels.sample_rows import sample_rows_combine_kernel, sample_rows_kernel
from loopmdm_kernels.triton.launch import launch, power_of_two, processor
from loopmdm_kernels.triton.linear import linear
from loopmdm_kernels.triton.operands import matrix
from loopmdm_kernels.types import SampledRows
from loopmdm_kernels.values import ceil_div

__all__ = ["run", "why_not"]

_ROWS_WITH_LOGITS = 256


def run(call: SampleCall) -> SampledRows:
    h = modulated_rows(call, call.rows.contiguous())
    weight, weight_scale = matrix(call.head.weight, call.dtype)
    bias = call.head.bias.detach().contiguous()
    if call.draw.restricted:

        def logits(part: slice) -> Tensor:
            return linear(h[part], weight, bias, weight_scale=weight_scale, out_dtype=torch.float32)

        return sample_in_parts(call, _ROWS_WITH_LOGITS, logits)
    (num_rows, size), (vocab_size, excluded) = h.shape, (call.vocab_size, call.head.excluded_token)
    tile = tiles("sample", (vocab_size, size), h.dtype, processor(h.device))
    chunks = ceil_div(vocab_size, chunk_of(tile))
    numbers = h.new_empty(6, num_rows, chunks, dtype=torch.float32)
    tokens = h.new_empty(2, num_rows, chunks, dtype=torch.int32)
    rng, race = call.draw.rng, call.draw.temperature > 0
    launch(
        sample_rows_kernel,
        (ceil_div(num_rows, tile.m), chunks),
        *(h, weight, weight_scale, bias, *(name.contiguous() for name in rng[1:]), numbers, tokens),
        *(num_rows, vocab_size, size, excluded, rng.seed, 1.0 / call.draw.temperature if race else 1.0),
        RACE=race,
        CHUNK=chunk_of(tile),
        **tile.options("MVK"),
    )
    out = SampledRows.empty(num_rows, h.device)
    at_once, last = 4, vocab_size - 1
    launch(
        sample_rows_combine_kernel,
        (ceil_div(num_rows, at_once),),
        *(numbers, tokens, *out, num_rows, chunks, last - 1 if excluded == last else last),
        RACE=race,
        ROWS=at_once,
        CHUNKS=power_of_two(chunks),
        num_warps=4,
        num_stages=1,
    )
    return out
