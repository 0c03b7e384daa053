"""Vocabulary projection and weighted cross-entropy on the masked rows only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.calls import CrossEntropyCall
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import Operator
from loopmdm_kernels.tracing import can_read, traced
from loopmdm_kernels.types import Fp8Head, Head


def masked_cross_entropy(
    hidden: Tensor,
    head: Head | Fp8Head | Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_r w_r * -log p(x0_r | xt) under the SUBS parameterization (MDLM, Eq. 10).

    Args:
        hidden: [B, L, D] float32 or float64, the residual stream before the final norm.
        head: final norm, modulation and vocabulary projection; `excluded_token` gets probability 0. A weight
            [V, D] alone is the plain loss of hidden weight^T; `Head.of(weight, bias=...)` adds to it.
        targets: [B, L] int64 clean tokens, read at `rows` only.
        rows: [R] int64 flat indices b*L + l of the masked tokens, R may be 0; or [B, L] bool, True at them;
            None: all tokens.
        row_weights: [R] float, the NELBO weight of each row (1/t); [B, L] where `rows` is; None: 1.
        compute_dtype: dtype of the projection's operands; None: that of `head.weight`, unless this is fp8.

    Returns:
        The weighted sum (scalar) and -log p of each row [R] in nats, float32 or float64; [B, L] where `rows`
        is, 0 at tokens that are not masked.
    """
    checks.tensor("hidden", hidden, dtypes=checks.STREAM_FLOATS, shape=("B", "L", "D"))
    checks.not_empty("hidden", hidden)
    batch, length, hidden_size = hidden.shape
    head = checks.given_head(head)
    vocab_size = checks.head(head, hidden_size, batch, hidden.device)
    checks.tensor("targets", targets, dtypes=(torch.int64,), shape=(batch, length), device=hidden.device)
    if isinstance(rows, Tensor) and rows.dtype == torch.bool:
        checks.tensor("rows", rows, dtypes=(torch.bool,), shape=(batch, length), device=hidden.device)
    else:
        if rows is None:
            rows = torch.arange(batch * length, device=hidden.device)
        checks.rows(rows, batch * length, hidden.device)
    if row_weights is None:
        row_weights = hidden.new_ones(rows.shape)
    checks.tensor(
        "row_weights", row_weights, dtypes=checks.FLOATS, shape=tuple(rows.shape), device=hidden.device
    )
    checks.compute_dtype(compute_dtype)
    if isinstance(head, Fp8Head):
        checks.for_inference("head", compute_dtype, hidden=hidden, row_weights=row_weights)
    # Before reading: indexing by a tensor with the lazy negative bit takes the numbers in its memory.
    call = checks.plain(CrossEntropyCall(hidden, head, compute_dtype, targets, rows, row_weights))
    if can_read(call.targets):
        wanted = (
            call.targets[call.rows] if call.rows.dtype == torch.bool else call.targets.flatten()[call.rows]
        )
        checks.in_range("targets", wanted, 0, vocab_size)
        if bool((wanted == head.excluded_token).any()):
            raise ValueError(f"targets: a row's target is the excluded token {head.excluded_token}")
    if isinstance(call.head, Fp8Head) and traced(call.hidden):  # the operator has no scale
        call = replace(call, head=call.head.dequantized(call.dtype))
    total, nll = OPERATOR(call)
    return total, nll


def _run(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    if call.rows.dtype != torch.bool:
        total, nll = backends.run("masked_cross_entropy", call)
        return total, nll
    chosen = call.rows.flatten().nonzero().squeeze(1)
    total, nll = _run(replace(call, rows=chosen, row_weights=call.row_weights.flatten()[chosen]))
    return total, nll.new_zeros(call.rows.numel()).index_copy(0, chosen, nll).view(call.rows.shape)


def _fake(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(call.hidden.dtype, call.dtype), torch.float32)
    return call.hidden.new_empty((), dtype=dtype), call.hidden.new_empty(call.rows.shape, dtype=dtype)


def _flops(call: CrossEntropyCall, _: object) -> int:
    known = call.rows.dtype == torch.bool and not traced(call.rows)
    return 2 * call.head.weight.shape.numel() * (int(call.rows.sum()) if known else call.rows.numel())


OPERATOR = Operator(
    CrossEntropyCall,
    "masked_cross_entropy(Tensor hidden, Tensor? norm, Tensor weight, Tensor bias, Tensor modulation, "
    "int excluded_token, Tensor targets, Tensor rows, Tensor row_weights, ScalarType compute_dtype)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    flops=_flops,
    run=_run,
    leaves=(0, 1, 2, 3, 4, 8),
)
