"""One exact categorical draw per selected row, without logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import register, register_flops
from loopmdm_kernels.tracing import traced
from loopmdm_kernels.types import Fp8Head, Fp8Weight, Head, RowRng, SampledRows


def sample_rows(
    hidden: Tensor,
    head: Head | Fp8Head | Tensor,
    rows: Tensor,
    rng: RowRng,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SampledRows:
    """Draw one token for each row from softmax(logits / temperature), and describe the row's distribution.

    The draw is an exponential race in fp32 with 64 random bits where they matter, exact to fp32 rounding.
    It is a function of the row's distribution and of its name (seed, sequence, step, position) alone.

    Args:
        hidden: [B, L, D] float32 or float64, the residual stream before the final norm.
        head: final norm, modulation and vocabulary projection; `excluded_token` is never drawn. A weight
            [V, D] alone stands for `Head.of(weight)`.
        rows: [R] int64 flat indices b*L + l; R may be 0.
        rng: names of the random numbers, see `RowRng`.
        temperature: 0, or from 1e-20 to 1e20; 0 takes the most probable token, the lowest id on ties.
        top_p: in (0, 1]; below 1, draw from the smallest set of most probable tokens that reaches it.
        top_k: draw from so many most probable tokens, the lowest ids on ties; with top_p, that is of these.
        compute_dtype: dtype of the projection's operands; None: that of `head.weight`, unless this is fp8.

    Returns:
        `SampledRows`; its statistics are of the distribution at temperature 1.
    """
    checks.tensor("hidden", hidden, dtypes=checks.STREAM_FLOATS, shape=("B", "L", "D"))
    checks.not_empty("hidden", hidden)
    batch, length, hidden_size = hidden.shape
    head = checks.given_head(head)
    vocab_size = checks.head(head, hidden_size, batch, hidden.device)
    checks.rows(rows, batch * length, hidden.device)
    rng = checks.row_rng(rng, rows.shape[0], hidden.device)
    temperature, top_p = checks.temperature(temperature), checks.top_p(top_p)
    if top_k is not None:
        top_k = checks.integer("top_k", top_k, 1, None, "None or an int >= 1", ValueError)
        top_k = top_k if top_k < vocab_size else vocab_size
    checks.compute_dtype(compute_dtype)
    if isinstance(head, Fp8Head):
        checks.for_inference("head", compute_dtype)
    hidden, head, rows, rng = checks.plain((hidden, head, rows, rng))
    if traced(hidden):
        norm, weight, *rest = head
        values, scale = weight if isinstance(weight, Fp8Weight) else (weight, None)
        options = (temperature, top_p, top_k, compute_dtype or head.weight.dtype)
        return SampledRows(
            *torch.ops.loopmdm.sample_rows(hidden, norm, values, scale, *rest, rows, *rng, *options)
        )
    return _run(hidden, head, rows, rng, temperature, top_p, top_k, compute_dtype)


def _run(
    hidden: Tensor,
    head: Head | Fp8Head,
    rows: Tensor,
    rng: RowRng,
    temperature: float,
    top_p: float,
    top_k: int | None,
    compute_dtype: torch.dtype | None,
) -> SampledRows:
    implementation = backends.implementation(
        "sample_rows",
        hidden.device,
        fp8_weights=isinstance(head, Fp8Head),
        hidden=hidden,
        head=head,
        compute_dtype=compute_dtype,
    )
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        sampled: SampledRows = implementation(
            hidden,
            head,
            rows,
            rng,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            compute_dtype=compute_dtype,
        )
    return sampled


def _operator(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    norm, weight, scale, *rest = args[:6]
    rows, rng, options = args[6], RowRng(*args[7:11]), args[11:]
    head = Head(norm, weight, *rest) if scale is None else Fp8Head(norm, Fp8Weight(weight, scale), *rest)
    # The results of an operator may not share memory.
    return tuple(field.clone() for field in _run(hidden, head, rows, rng, *options))


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rows, compute_dtype = args[6], args[14]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, compute_dtype), torch.float32)
    tokens = [hidden.new_empty(rows.shape[0], dtype=torch.int64) for _ in range(2)]
    numbers = [hidden.new_empty(rows.shape[0], dtype=dtype) for _ in range(4)]
    return tuple(SampledRows(tokens[0], numbers[0], tokens[1], *numbers[1:]))


register(
    "sample_rows(Tensor hidden, Tensor? norm, Tensor weight, Tensor? weight_scale, Tensor bias, "
    "Tensor modulation, int excluded_token, Tensor rows, SymInt seed, Tensor sequence, Tensor step, "
    "Tensor position, float temperature, float top_p, SymInt? top_k, ScalarType compute_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _operator,
    _fake,
)
register_flops(
    "sample_rows",
    lambda hidden, norm, weight, *rest, out_val=None: 2 * rest[4].shape[0] * weight.numel(),
)
