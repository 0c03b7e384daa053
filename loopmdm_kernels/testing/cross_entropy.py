"""Cases of `masked_cross_entropy`, and what the tests of every backend compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.testing import reference
from loopmdm_kernels.testing.generators import head_inputs
from loopmdm_kernels.testing.tolerance import assert_matches_oracle
from loopmdm_kernels.types import Head

LEAVES = ("hidden", "norm", "weight", "bias", "modulation", "row_weights")


class CrossEntropyInputs(NamedTuple):
    """`leaves` by the names in LEAVES; targets int64 [B, L]; rows int64 [R], some of them repeated."""

    leaves: dict[str, Tensor]
    targets: Tensor
    rows: Tensor
    excluded_token: int


def cross_entropy_inputs(
    width: int,
    vocab_size: int,
    num_rows: int,
    dtype: torch.dtype,
    *,
    length: int = 11,
    scale: float = 3.0,
    excluded: bool = True,
    sequences: bool = True,
    device: torch.device | str = "cpu",
    **options: Any,
) -> CrossEntropyInputs:
    """Three sequences in the dtypes of training: a stream in float32, `scale` times as large as `head_inputs`
    makes it, and parameters in `dtype`.

    sequences: a modulation for each; options are those of `head_inputs`.
    """
    hidden, head = head_inputs(3, length, width, vocab_size, per_sequence_modulation=sequences, **options)
    generator = torch.Generator().manual_seed(width + vocab_size)
    excluded_token = vocab_size // 2 if excluded else -1
    targets = torch.randint(0, vocab_size - excluded, (3, length), generator=generator)
    if excluded:
        targets += targets >= excluded_token
    rows = torch.randint(0, 3 * length, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator) + 0.5
    leaves = (scale * hidden.float(), *(t.to(dtype) for t in head.tensors), weights)
    named = dict(zip(LEAVES, (leaf.to(device) for leaf in leaves), strict=True))
    return CrossEntropyInputs(named, targets.to(device), rows.to(device), excluded_token)


def cross_entropy_results(
    op: Callable[..., Any],
    leaves: dict[str, Tensor],
    targets: Tensor,
    rows: Tensor,
    excluded_token: int,
    *,
    kind: torch.dtype | None = None,
    wanted: Sequence[str] = LEAVES,
    upstream: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """total [1], nll [R] and the gradients of `wanted` of upstream (0.7 total + random . nll).

    kind: dtype to compute in; None: that of each leaf.
    """
    leaves = {name: (leaf if kind is None else leaf.to(kind)).detach() for name, leaf in leaves.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    hidden, norm, weight, bias, modulation, row_weights = leaves.values()
    head = Head(norm, weight, bias, modulation, excluded_token)
    total, nll = op(hidden, head, targets, rows, row_weights, **options)
    mix = torch.randn(rows.shape[0], generator=torch.Generator().manual_seed(5)).to(nll)
    loss = upstream * (0.7 * total + (mix * nll).sum())
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    return {"total": total.detach()[None], "nll": nll.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_cross_entropy(
    op: Callable[..., Any],
    inputs: tuple[dict[str, Tensor], Tensor, Tensor, int],
    *,
    total_rtol: float = 1e-7,
    gradient_factor: float = 2.0,
    **options: Any,
) -> None:
    """nll and all gradients by the tolerance rule, with `gradient_factor` for these; total from nll."""
    reference_op = reference.masked_cross_entropy
    out, baseline = (cross_entropy_results(each, *inputs, **options) for each in (op, reference_op))
    oracle = cross_entropy_results(reference_op, *inputs, kind=torch.float64)
    total = (out["nll"].double() * inputs[0]["row_weights"].double()).sum()
    torch.testing.assert_close(out["total"][0], total.float(), rtol=total_rtol, atol=0)
    for name, value in out.items():
        assert value.dtype == baseline[name].dtype, name
        if name == "total":  # one number: its error says little
            continue
        factor = 2.0 if name == "nll" else gradient_factor
        assert_matches_oracle(value, baseline[name], oracle[name], name=name, factor=factor)
