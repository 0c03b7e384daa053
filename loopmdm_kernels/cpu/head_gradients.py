"""Gradients of hidden and head: what the backward of `masked_cross_entropy` and `head_logits` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels.cpu.head import norm_or_ones


def head_problem(leaves: Sequence[Any], rows: Tensor, bf16: bool) -> dict[str, Any]:
    """The arguments that their kernels have in common."""
    hidden, norm, weight, bias, modulation = leaves  # norm may be None
    shift, scale = modulation.float().unbind(1)
    return {
        "hidden": hidden.contiguous(),
        "rows": rows.contiguous(),
        "norm": norm_or_ones(norm, hidden),
        "shift": shift.contiguous(),
        "gain": (1 + scale).contiguous(),
        "weight": weight.contiguous(),
        "bias": bias.float().contiguous(),
        "normalized": norm is not None,
        "bf16": bf16,
        "num_threads": torch.get_num_threads(),
    }


def weight_gradient_memory(weight: Tensor, num_rows: int) -> Tensor:
    from loopmdm_kernels import _C

    sums_in_weight_dtype = num_rows <= _C.CROSS_ENTROPY_GROUP_ROWS
    return torch.empty(weight.shape, dtype=weight.dtype if sums_in_weight_dtype else torch.float32)


class HeadGradients:
    """Memory for those of hidden, norm, weight, bias and modulation that are wanted.

    `weight_memory`: from `weight_gradient_memory`; None: new.
    """

    def __init__(
        self,
        leaves: Sequence[Any],
        wanted: Sequence[bool],
        num_rows: int,
        weight_memory: Tensor | None = None,
    ) -> None:
        hidden, _, weight, bias, modulation = self._leaves = leaves
        want_hidden, want_norm, want_weight, want_bias, want_modulation = wanted

        def zeros(wanted: bool, shape: torch.Size) -> Tensor | None:
            return torch.zeros(shape, dtype=torch.float32) if wanted else None

        if want_weight and weight_memory is None:
            weight_memory = weight_gradient_memory(weight, num_rows)
        self._weight = weight_memory if want_weight else None
        self._bias = torch.empty(bias.shape, dtype=torch.float32) if want_bias else None
        if not num_rows:  # otherwise the kernel writes them in full
            for grad in (self._weight, self._bias):
                if grad is not None:
                    grad.zero_()
        self._hidden, self._norm = zeros(want_hidden, hidden.shape), zeros(want_norm, hidden.shape[-1:])
        self._shift, self._scale = (zeros(want_modulation, modulation[:, 0].shape) for _ in range(2))

    def arguments(self) -> dict[str, Any]:
        """Where a kernel is to write."""
        return {
            "grad_hidden": self._hidden,
            "grad_norm": self._norm,
            "grad_shift": self._shift,
            "grad_scale": self._scale,
            "grad_weight": self._weight,
            "grad_bias": self._bias,
        }

    def results(self) -> tuple[Tensor | None, ...]:
        modulation = None
        if self._shift is not None and self._scale is not None:
            modulation = torch.stack((self._shift, self._scale), 1)
        grads = (self._hidden, self._norm, self._weight, self._bias, modulation)
        return tuple(
            None if grad is None else grad.to(leaf.dtype)
            for grad, leaf in zip(grads, self._leaves, strict=True)
        )
