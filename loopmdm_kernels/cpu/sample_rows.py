"""`sample_rows` on the CPU: float32 or bfloat16 operands, float32 sums, no logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.types import Head, RowRng, SampledRows

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


def supports(
    *, hidden: Tensor, head: Head, top_p: float = 1.0, compute_dtype: torch.dtype | None = None
) -> str | None:
    """Why these arguments need another backend, or None."""
    if hidden.dtype != torch.float32:
        return f"hidden must be float32, got {hidden.dtype}"
    if head.weight.dtype not in _WEIGHT_DTYPES:
        return f"head.weight must be float32 or bfloat16, got {head.weight.dtype}"
    if (compute_dtype or head.weight.dtype) not in _WEIGHT_DTYPES:
        return f"compute_dtype must be float32 or bfloat16, got {compute_dtype}"
    if top_p < 1.0:
        return f"top_p must be 1, got {top_p}"
    return None


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
    shift, scale = head.modulation.to(dtype).unbind(1)
    num_rows = rows.shape[0]
    out = SampledRows(
        *(
            torch.empty(num_rows, dtype=torch.int64 if name.endswith("token") else torch.float32)
            for name in SampledRows._fields
        )
    )
    _C.sample_rows(
        hidden.contiguous(),
        rows.contiguous(),
        head.norm.float().contiguous(),
        shift.float().contiguous(),
        (1 + scale).float().contiguous(),
        head.weight.contiguous(),
        head.bias.float().contiguous(),
        head.excluded_token,
        rng.seed,
        rng.sequence.contiguous(),
        rng.step.contiguous(),
        rng.position.contiguous(),
        temperature,
        dtype == torch.bfloat16,
        torch.get_num_threads(),
        *out,
    )
    return out
