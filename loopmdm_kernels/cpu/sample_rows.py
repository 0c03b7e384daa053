"""`sample_rows` on the CPU: fp32 or bf16 operands, fp32 sums; logits in memory for top_p and top_k only."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.cpu.head import head_arguments, why_not
from loopmdm_kernels.reference.sample_rows import sample_logits
from loopmdm_kernels.types import Head, RowRng, SampledRows

_ROWS_WITH_LOGITS = 64  # top_p and top_k need a row's logits together


def supports(*, hidden: Tensor, head: Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    return why_not(hidden, head, compute_dtype)


def sample_rows(
    hidden: Tensor,
    head: Head,
    rows: Tensor,
    rng: RowRng,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SampledRows:
    from loopmdm_kernels import _C

    reason = supports(hidden=hidden, head=head, compute_dtype=compute_dtype)
    if reason is not None:
        raise ValueError(f"sample_rows on the CPU: {reason}")
    dtype = compute_dtype or head.weight.dtype
    num_rows = rows.shape[0]
    if temperature > 0 and (top_p < 1.0 or top_k is not None):
        parts = [
            _sample_restricted(hidden, head, rows[part], _named(rng, part), temperature, top_p, top_k, dtype)
            for part in torch.split(torch.arange(num_rows), _ROWS_WITH_LOGITS)
        ]
        return SampledRows(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    out = SampledRows(
        *(
            torch.empty(num_rows, dtype=torch.int64 if name.endswith("token") else torch.float32)
            for name in SampledRows._fields
        )
    )
    _C.sample_rows(
        *head_arguments(hidden, head, rows, dtype),
        head.excluded_token,
        rng.seed,
        rng.sequence.contiguous(),
        rng.step.contiguous(),
        rng.position.contiguous(),
        temperature,
        torch.get_num_threads(),
        *out,
    )
    return out


def _sample_restricted(
    hidden: Tensor,
    head: Head,
    rows: Tensor,
    rng: RowRng,
    temperature: float,
    top_p: float,
    top_k: int | None,
    dtype: torch.dtype,
) -> SampledRows:
    from loopmdm_kernels import _C

    logits = torch.empty(rows.shape[0], head.weight.shape[0], dtype=torch.float32)
    _C.head_logits(*head_arguments(hidden, head, rows, dtype), torch.get_num_threads(), logits)
    return sample_logits(
        logits,
        head.excluded_token,
        rng,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        draw=draw_restricted,
    )


def draw_restricted(
    log_probs: Tensor, temperature: float, top_p: float, top_k: int | None, rng: RowRng
) -> Tensor:
    """The tokens of `reference.nucleus.draw_restricted`, which sorts whole rows."""
    from loopmdm_kernels import _C

    num_rows, vocab_size = log_probs.shape
    threads = torch.get_num_threads()
    most = vocab_size if top_k is None else min(top_k, vocab_size)
    probs = None
    if top_p < 1.0:
        tempered = torch.log_softmax(log_probs / temperature, dim=-1)
        if top_k is not None:
            best = torch.empty(num_rows, most)
            _C.largest_values(tempered, threads, best)
            tempered = tempered - best.logsumexp(dim=-1, keepdim=True)
        probs = tempered.exp()
    token = torch.empty(num_rows, dtype=torch.int64)
    _C.draw_restricted(
        log_probs,
        log_probs,  # the order; at a high temperature fp32 does not tell the tempered ones apart
        probs,
        most,
        top_p,
        rng.seed,
        rng.sequence.contiguous(),
        rng.step.contiguous(),
        rng.position.contiguous(),
        temperature,
        threads,
        token,
    )
    return token


def _named(rng: RowRng, part: Tensor) -> RowRng:
    return RowRng(rng.seed, rng.sequence[part], rng.step[part], rng.position[part])
