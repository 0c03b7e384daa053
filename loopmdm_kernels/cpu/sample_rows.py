"""`sample_rows` on the CPU: fp32 or bf16 operands, fp32 sums; logits in memory for top_p and top_k only."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.calls import Draw, SampleCall
from loopmdm_kernels.cpu.head import HeadOperands, head_operands, why_not
from loopmdm_kernels.cpu.packing import quantized_head
from loopmdm_kernels.reference.sample_rows import sample_in_parts
from loopmdm_kernels.types import RowRng, SampledRows

__all__ = ["reads_bytes", "run", "token_operands", "why_not"]

_ROWS_WITH_LOGITS = 64  # top_p and top_k need a row's logits together
_LEAST_QUANTIZED = 2**22  # weights; fewer are read from a cache


def run(call: SampleCall) -> SampledRows:
    from loopmdm_kernels import _C

    threads = torch.get_num_threads()
    if call.draw.restricted:

        def logits(part: slice) -> Tensor:
            rows = call.rows[part]
            out = torch.empty(rows.shape[0], call.vocab_size, dtype=torch.float32)
            _C.head_logits(*head_operands(call, rows), threads, out)
            return out

        return sample_in_parts(call, _ROWS_WITH_LOGITS, logits, draw_restricted)
    out = SampledRows.empty(call.rows.shape[0])
    if not call.draw.statistics and reads_bytes(call):
        _draw_tokens(call, out.token)
        return out
    operands = head_operands(call, call.rows)
    names, temperature = _names(call.draw.rng), call.draw.temperature
    _C.sample_rows(*operands, call.head.excluded_token, *names, temperature, threads, *out)
    return out


def reads_bytes(call: SampleCall) -> bool:
    """Whether a token alone is drawn from a copy of the weight in bytes."""
    from loopmdm_kernels import _C

    weight, draw = call.head.weight, call.draw
    assert isinstance(weight, Tensor)  # fp8 weights are refused before
    large = weight.numel() >= _LEAST_QUANTIZED and weight.shape[1] <= _C.MOST_QUANTIZED_WIDTH
    return large and weight.is_contiguous() and not draw.restricted


def _draw_tokens(call: SampleCall, token: Tensor) -> None:
    from loopmdm_kernels import _C

    operands, quantized = token_operands(call)
    how = (*_names(call.draw.rng), call.draw.temperature, torch.get_num_threads())
    finite = torch.empty(token.shape, dtype=torch.bool)
    _C.sample_tokens(*operands, quantized, call.head.excluded_token, *how, token, finite)


def token_operands(call: SampleCall) -> tuple[HeadOperands, Tensor]:
    """The first arguments of `_C.sample_tokens`: those of the head, and its weight in bytes."""
    operands = head_operands(call, call.rows, packed=False)
    weight = call.head.weight
    assert isinstance(weight, Tensor)
    return operands, quantized_head(weight, bf16=operands[-1])


def draw_restricted(log_probs: Tensor, draw: Draw) -> Tensor:
    """The tokens of `reference.nucleus.draw_restricted`, which sorts whole rows."""
    from loopmdm_kernels import _C

    num_rows, vocab_size = log_probs.shape
    threads = torch.get_num_threads()
    most = vocab_size if draw.top_k is None else min(draw.top_k, vocab_size)
    probs = None
    if draw.top_p < 1.0:
        tempered = torch.log_softmax(log_probs / draw.temperature, dim=-1)
        if draw.top_k is not None:
            best = torch.empty(num_rows, most)
            _C.largest_values(tempered, threads, best)
            tempered = tempered - best.logsumexp(dim=-1, keepdim=True)
        probs = tempered.exp()
    token = torch.empty(num_rows, dtype=torch.int64)
    # log_probs are the order too: at a high temperature fp32 does not tell the tempered ones apart.
    how = (*_names(draw.rng), draw.temperature)
    _C.draw_restricted(log_probs, log_probs, probs, most, draw.top_p, *how, threads, token)
    return token


def _names(rng: RowRng) -> tuple[int, Tensor, Tensor, Tensor]:
    return rng.seed, rng.sequence.contiguous(), rng.step.contiguous(), rng.position.contiguous()
