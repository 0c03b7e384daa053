"""Logits at every position, for callers that want them; training and sampling never do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.ops import checks
from loopmdm_kernels.ops.library import differentiable, register, register_autograd, register_flops
from loopmdm_kernels.tracing import traced, without_autocast
from loopmdm_kernels.types import Fp8Head, Fp8Weight, Head


def head_logits(
    hidden: Tensor, head: Head | Fp8Head | Tensor, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Logits [B, L, V] in the compute dtype, the excluded token's included.

    Args:
        hidden: [B, L, D] float32 or float64, the residual stream before the final norm.
        head: final norm, modulation and vocabulary projection, or a weight [V, D] alone, see `Head.of`.
        compute_dtype: dtype of the projection's operands and of the result; None: that of `head.weight`,
            unless this is fp8.
    """
    checks.tensor("hidden", hidden, dtypes=checks.STREAM_FLOATS, shape=("B", "L", "D"))
    checks.not_empty("hidden", hidden)
    batch, _, hidden_size = hidden.shape
    head = checks.given_head(head)
    checks.head(head, hidden_size, batch, hidden.device)
    checks.compute_dtype(compute_dtype)
    if isinstance(head, Fp8Head):
        checks.for_inference("head", compute_dtype, hidden=hidden)
    hidden, head = checks.plain((hidden, head))
    if traced(hidden):
        norm, weight, bias, modulation, _ = head
        values, scale = weight if isinstance(weight, Fp8Weight) else (weight, None)
        dtype = compute_dtype or head.weight.dtype
        out: Tensor = torch.ops.loopmdm.head_logits(hidden, norm, values, scale, bias, modulation, dtype)
        return out
    return _run(hidden, head, compute_dtype)


def _run(hidden: Tensor, head: Head | Fp8Head, compute_dtype: torch.dtype | None) -> Tensor:
    implementation = _implementation("head_logits", hidden, head, compute_dtype)
    with without_autocast(hidden.device):
        logits: Tensor = implementation(hidden, head, compute_dtype=compute_dtype)
    return logits


def _implementation(
    op: str, hidden: Tensor, head: Head | Fp8Head, compute_dtype: torch.dtype | None
) -> Callable[..., Any]:
    return backends.implementation(
        op,
        hidden.device,
        fp8_weights=isinstance(head, Fp8Head),
        hidden=hidden,
        head=head,
        compute_dtype=compute_dtype,
    )


def _forward_run(hidden: Tensor, *args: Any) -> Tensor:
    norm, weight, scale, bias, modulation, compute_dtype = args
    if scale is None:
        return _run(hidden, Head(norm, weight, bias, modulation), compute_dtype)
    return _run(hidden, Fp8Head(norm, Fp8Weight(weight, scale), bias, modulation), compute_dtype)


def _backward_run(grad: Tensor, wanted: Sequence[bool], hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, norm, weight, bias and modulation; [0] where not wanted."""
    norm, weight, _, bias, modulation, compute_dtype = args
    head = Head(norm, weight, bias, modulation)
    implementation = _implementation("head_logits_backward", hidden, head, compute_dtype)
    with differentiable(), without_autocast(hidden.device):
        grads = implementation(grad, hidden, head, tuple(wanted), compute_dtype=compute_dtype)
    return tuple(hidden.new_empty(0) if value is None else value for value in grads)


def _fake(hidden: Tensor, norm: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return hidden.new_empty(*hidden.shape[:2], weight.shape[0], dtype=args[-1])


def _backward_fake(grad: Tensor, wanted: Sequence[bool], *args: Any) -> tuple[Tensor, ...]:
    leaves = [args[i] for i in (0, 1, 2, 4, 5)]
    return tuple(
        leaf.new_empty(leaf.shape) if want else args[0].new_empty(0)
        for leaf, want in zip(leaves, wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.compute_dtype = inputs[6]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_leaves = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
    grads = torch.ops.loopmdm.head_logits_backward(grad, of_leaves, *ctx.saved_tensors, ctx.compute_dtype)
    hidden, norm, weight, bias, modulation = (
        value if want else None for value, want in zip(grads, of_leaves, strict=True)
    )
    return hidden, norm, weight, None, bias, modulation, None


_ARGUMENTS = (
    "Tensor hidden, Tensor? norm, Tensor weight, Tensor? weight_scale, Tensor bias, Tensor modulation, "
    "ScalarType compute_dtype"
)
register(f"head_logits({_ARGUMENTS}) -> Tensor", _forward_run, _fake)
register(
    f"head_logits_backward(Tensor grad, bool[] wanted, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_run,
    _backward_fake,
)
register_autograd("head_logits", _backward, _setup_context)
register_flops(
    "head_logits",
    lambda hidden, norm, weight, *rest, out_val=None: 2 * hidden.shape[0] * hidden.shape[1] * weight.numel(),
)
