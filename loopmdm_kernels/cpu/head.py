"""What the ops that end in the vocabulary head share: operands of their kernels, and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loopmdm_kernels.calls import HeadCall
from loopmdm_kernels.cpu.gradient_memory import gradient_memory
from loopmdm_kernels.cpu.operands import DTYPES, vector
from loopmdm_kernels.cpu.packing import packed_linear

HeadOperands: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool]

_MAX_VOCABULARY = 2**31 - 1025  # numbers of tokens are int32, and those of a task reach up to 1024 further


def why_not(call: HeadCall) -> str | None:
    if call.hidden.dtype != torch.float32:
        return f"hidden must be float32, got {call.hidden.dtype}"
    if call.head.weight.dtype not in DTYPES:
        return f"head.weight must be float32 or bfloat16, got {call.head.weight.dtype}"
    if call.dtype not in DTYPES:
        return f"compute_dtype must be float32 or bfloat16, got {call.compute_dtype}"
    if call.vocab_size > _MAX_VOCABULARY:
        return f"head.weight may have {_MAX_VOCABULARY} tokens, got {call.vocab_size}"
    return None


def head_operands(call: HeadCall, rows: Tensor, *, packed: bool = True) -> HeadOperands:
    """The first arguments of `_C.sample_rows` and `_C.head_logits`, the weight packed for this processor.

    packed: False for `_C.sample_tokens`, which takes it as it is.
    """
    weight, bf16 = call.head.weight, call.dtype == torch.bfloat16
    assert isinstance(weight, Tensor)  # fp8 weights are refused before
    return (
        call.hidden.contiguous(),
        rows.contiguous(),
        _norm_or_ones(call),
        *_shift_and_gain(call),
        packed_linear(weight, bf16=bf16) if packed else weight.detach(),
        vector(call.head.bias),
        call.head.norm is not None,
        bf16,
    )


def _shift_and_gain(call: HeadCall) -> tuple[Tensor, Tensor]:
    """[M, D] each in float32, rounded as every op rounds them: logits of the loss are those of sampling."""
    shift, scale = call.head.modulation.to(call.dtype).unbind(1)
    return shift.float().contiguous(), (1 + scale).float().contiguous()


def plain_operands(call: HeadCall, rows: Tensor) -> dict[str, Any]:
    """What the other kernels have in common, the weight as it is."""
    shift, gain = _shift_and_gain(call)
    weight = call.head.weight
    assert isinstance(weight, Tensor)
    return {
        "hidden": call.hidden.contiguous(),
        "rows": rows.contiguous(),
        "norm": _norm_or_ones(call),
        "shift": shift,
        "gain": gain,
        "weight": weight.contiguous(),
        "bias": vector(call.head.bias),
        "normalized": call.head.norm is not None,
        "bf16": call.dtype == torch.bfloat16,
        "num_threads": torch.get_num_threads(),
    }


def _norm_or_ones(call: HeadCall) -> Tensor:
    """The scale of the norm; kernels also read it where there is no norm."""
    return torch.ones(call.hidden.shape[-1]) if call.head.norm is None else vector(call.head.norm)


def weight_gradient_memory(weight: Tensor, num_rows: int) -> Tensor:
    from loopmdm_kernels import _C

    sums_in_weight_dtype = num_rows <= _C.CROSS_ENTROPY_GROUP_ROWS
    return gradient_memory(weight, weight.dtype if sums_in_weight_dtype else torch.float32)


class HeadGradients:
    """Memory for those of hidden, norm, weight, bias and modulation that are wanted.

    `weight_memory`: from `weight_gradient_memory`; None: new.
    """

    def __init__(
        self, call: HeadCall, wanted: Sequence[bool], num_rows: int, weight_memory: Tensor | None = None
    ) -> None:
        hidden, _, weight, bias, modulation = self._leaves = call.leaves[:5]
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
            grad if grad is None or grad.dtype == leaf.dtype else grad.to(leaf.dtype)
            for grad, leaf in zip(grads, self._leaves, strict=True)
        )
