"""`sample_rows` on the CPU: float32 or bfloat16 operands, float32 sums, no logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.cpu.head import head_arguments, why_not
from loopmdm_kernels.types import Head, RowRng, SampledRows


def supports(
    *, hidden: Tensor, head: Head, top_p: float = 1.0, compute_dtype: torch.dtype | None = None
) -> str | None:
    """Why these arguments need another backend, or None."""
    if top_p < 1.0:
        return f"top_p must be 1, got {top_p}"
    return why_not(hidden, head, compute_dtype)


def sample_rows(
    hidden: Tensor,
    head: Head,
    rows: Tensor,
    rng: RowRng,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> SampledRows:
    from loopmdm_kernels import _C

    reason = supports(hidden=hidden, head=head, top_p=top_p, compute_dtype=compute_dtype)
    if reason is not None:
        raise ValueError(f"sample_rows on the CPU: {reason}")
    dtype = compute_dtype or head.weight.dtype
    num_rows = rows.shape[0]
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
