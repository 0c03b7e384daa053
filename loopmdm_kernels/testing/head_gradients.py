"""What `head_logits` of any backend is tested by: its logits, and its gradients of hidden and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.testing import reference
from loopmdm_kernels.testing.tolerance import assert_matches_oracle
from loopmdm_kernels.types import Head

_NAMES = ("logits", "hidden", *Head._fields[:4])


def head_gradients(
    op: Callable[..., Any],
    hidden: Tensor,
    head: Head,
    *,
    wanted: Sequence[int] = range(5),
    kind: torch.dtype | None = None,
    upstream: torch.dtype | None = None,
    **options: Any,
) -> list[Tensor | None]:
    """Logits and gradients of random . logits: of hidden, norm, weight, bias, modulation; None if not wanted.

    kind: dtype to compute in; None: that of each tensor. upstream: whose values the random gradient of the
    logits takes; None: that of the logits.
    """
    leaves = [(t if kind is None else t.to(kind)).detach() for t in (hidden, *head.tensors)]
    for index in wanted:
        leaves[index].requires_grad_()
    leaf, norm, weight, bias, modulation = leaves
    logits = op(leaf, Head(norm, weight, bias, modulation, head.excluded_token), **options)
    mix = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits.device)
    mix = mix.to(upstream or logits.dtype).to(logits.dtype)
    grads = iter(torch.autograd.grad(logits, [leaves[index] for index in wanted], mix))
    return [logits.detach(), *(next(grads) if index in wanted else None for index in range(5))]


def assert_head_gradients(
    op: Callable[..., Any], hidden: Tensor, head: Head, *, compute_dtype: torch.dtype | None = None
) -> None:
    """Logits and all gradients by the tolerance rule."""
    dtype = compute_dtype or head.weight.dtype
    out, baseline = (
        head_gradients(each, hidden, head, compute_dtype=dtype) for each in (op, reference.head_logits)
    )
    oracle = head_gradients(reference.head_logits, hidden, head, kind=torch.float64, upstream=dtype)
    for name, value, plain, exact in zip(_NAMES, out, baseline, oracle, strict=True):
        assert value is not None and plain is not None and exact is not None
        assert value.dtype == plain.dtype, name
        assert_matches_oracle(value, plain, exact, name=name)
