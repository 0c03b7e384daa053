"""Vocabulary projection and weighted cross-entropy on the masked rows only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import differentiable, register, register_autograd, register_flops
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
    hidden, head, targets, rows, row_weights = checks.plain((hidden, head, targets, rows, row_weights))
    if can_read(targets):
        wanted = targets[rows] if rows.dtype == torch.bool else targets.flatten()[rows]
        checks.in_range("targets", wanted, 0, vocab_size)
        if bool((wanted == head.excluded_token).any()):
            raise ValueError(f"targets: a row's target is the excluded token {head.excluded_token}")
    if traced(hidden):
        if isinstance(head, Fp8Head):
            head = head.dequantized(compute_dtype or hidden.dtype)
        total, nll = torch.ops.loopmdm.masked_cross_entropy(
            hidden, *head, targets, rows, row_weights, compute_dtype or head.weight.dtype
        )
        return total, nll
    return _run(hidden, head, targets, rows, row_weights, compute_dtype)


def _run(
    hidden: Tensor,
    head: Head | Fp8Head,
    targets: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if rows.dtype == torch.bool:
        chosen = rows.flatten().nonzero().squeeze(1)
        total, nll = _run(hidden, head, targets, chosen, row_weights.flatten()[chosen], compute_dtype)
        return total, nll.new_zeros(rows.numel()).index_copy(0, chosen, nll).view(rows.shape)
    implementation = backends.implementation(
        "masked_cross_entropy",
        hidden.device,
        fp8_weights=isinstance(head, Fp8Head),
        hidden=hidden,
        head=head,
        compute_dtype=compute_dtype,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        total, nll = implementation(hidden, head, targets, rows, row_weights, compute_dtype=compute_dtype)
    return total, nll


def _forward_run(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _run(hidden, Head(*args[:5]), *args[5:])


def _backward_run(grad_total: Tensor, grad_nll: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, norm, weight, bias, modulation and row_weights."""
    hidden, norm, weight, bias, modulation, excluded_token, targets, rows, row_weights, compute_dtype = args
    with differentiable():
        given = (hidden, norm, weight, bias, modulation, row_weights)
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in given]
        hidden, norm, weight, bias, modulation, row_weights = leaves
        head = Head(norm, weight, bias, modulation, excluded_token)
        outputs = _run(hidden, head, targets, rows, row_weights, compute_dtype)
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(outputs, wanted, (grad_total, grad_nll)))
    return tuple(given[0].new_empty(0) if leaf is None else next(grads) for leaf in leaves)


def _fake(hidden: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, compute_dtype = rest[3], rest[5]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, compute_dtype), torch.float32)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(rows.shape, dtype=dtype)


def _backward_fake(grad_total: Tensor, grad_nll: Tensor, *args: Any) -> tuple[Tensor, ...]:
    leaves = [args[i] for i in (0, 1, 2, 3, 4, 8)]
    return tuple(args[0].new_empty(0) if leaf is None else torch.empty_like(leaf) for leaf in leaves)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, norm, weight, bias, modulation, excluded_token, targets, rows, row_weights, compute_dtype = inputs
    ctx.save_for_backward(hidden, norm, weight, bias, modulation, targets, rows, row_weights)
    ctx.excluded_token, ctx.compute_dtype = excluded_token, compute_dtype


def _backward(ctx: Any, grad_total: Tensor, grad_nll: Tensor) -> tuple[Any, ...]:
    *tensors, targets, rows, row_weights = ctx.saved_tensors
    grads = torch.ops.loopmdm.masked_cross_entropy_backward(
        grad_total, grad_nll, *tensors, ctx.excluded_token, targets, rows, row_weights, ctx.compute_dtype
    )
    of_hidden, of_norm, *others, of_row_weights = grads
    of_norm = None if tensors[1] is None else of_norm
    return (of_hidden, of_norm, *others, None, None, None, of_row_weights, None)


_ARGUMENTS = (
    "Tensor hidden, Tensor? norm, Tensor weight, Tensor bias, Tensor modulation, int excluded_token, "
    "Tensor targets, Tensor rows, Tensor row_weights, ScalarType compute_dtype"
)
register(f"masked_cross_entropy({_ARGUMENTS}) -> (Tensor, Tensor)", _forward_run, _fake)
register(
    f"masked_cross_entropy_backward(Tensor grad_total, Tensor grad_nll, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)
register_autograd("masked_cross_entropy", _backward, _setup_context)


def _flops(hidden: Tensor, norm: Tensor, weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    rows = rest[4]
    known = rows.dtype == torch.bool and not traced(rows)
    return 2 * weight.numel() * (int(rows.sum()) if known else rows.numel())


register_flops("masked_cross_entropy", _flops)
