"""One exact categorical draw per selected row, without logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.calls import Draw, SampleCall
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import Operator
from loopmdm_kernels.types import Fp8Head, Head, RowRng, SampledRows


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
    statistics: bool = True,
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
        statistics: False: the token alone is wanted, the same one. On a CPU a large head is then read as
            bytes, of which a copy is kept, and exactly only where a token may win.

    Returns:
        `SampledRows`; its statistics are of the distribution at temperature 1, or NaN if not wanted.
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
    if not isinstance(statistics, bool):
        raise TypeError(f"statistics: got {statistics!r}, expected a bool")
    draw = Draw(rng, temperature, top_p, top_k, statistics)
    return SampledRows(*OPERATOR(checks.plain(SampleCall(hidden, head, compute_dtype, rows, draw))))


def _run(call: SampleCall) -> SampledRows:
    with torch.no_grad():
        sampled: SampledRows = backends.run("sample_rows", call)
        return sampled if call.draw.statistics else SampledRows.of_tokens(sampled.token, _dtype(call))


def _fake(call: SampleCall) -> tuple[Tensor, ...]:
    return SampledRows.empty(call.rows.shape[0], call.hidden.device, _dtype(call))


def _dtype(call: SampleCall) -> torch.dtype:
    """Of the statistics."""
    return torch.promote_types(torch.promote_types(call.hidden.dtype, call.dtype), torch.float32)


OPERATOR = Operator(
    SampleCall,
    "sample_rows(Tensor hidden, Tensor? norm, Tensor weight, Tensor? weight_scale, Tensor bias, "
    "Tensor modulation, int excluded_token, Tensor rows, SymInt seed, Tensor sequence, Tensor step, "
    "Tensor position, float temperature, float top_p, SymInt? top_k, bool statistics, "
    "ScalarType compute_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    flops=lambda call, _: 2 * call.rows.shape[0] * call.head.weight.shape.numel(),
    run=_run,
    traced=lambda _, sampled: tuple(field.clone() for field in sampled),
)
