"""Who looks on: a call goes straight to a backend, unless something in PyTorch must see it as an operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

_P = ParamSpec("_P")
_R = TypeVar("_R")

_TWICE = (
    "loopmdm_kernels: the kernels differentiate once; for gradients of gradients compute in plain PyTorch: "
    "with use_backend('reference'), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
)


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work: they see PyTorch only."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def traced(*tensors: Tensor) -> bool:
    """Whether a call must go through its operator in the `loopmdm` library.

    So it is under torch.compile and torch.export, in a dispatch mode (such as FlopCounterMode or
    FakeTensorMode) or torch.jit.trace, and for tensors that hold no values.
    """
    return torch.compiler.is_compiling() or (
        not transformed()
        and (
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None
            or any([tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors])
        )
    )


def not_compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """As `torch.compiler.disable`, which imports the compiler, and that takes longer than all the rest.

    The decorator inside torch imports it when it is called, and it is called where something is compiled.
    """
    interrupts = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return (interrupts if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


def constant_when_compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """As `torch.compiler.assume_constant_result`, which imports the compiler to set this attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def can_read(value: Tensor) -> bool:
    """Whether the values of a tensor can be looked at without waiting for a device."""
    return value.device.type == "cpu" and not traced(value) and not transformed()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Of an autograd.Function's backward: gradients of the gradients raise an error that names the way.

    PyTorch's decorator of this name lets a second derivative with respect to what the forward pass saved
    come out as zero where the incoming gradient is a constant, such as that of a scalar loss.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            out = backward(ctx, *grads)
        values, structure = tree_flatten(out)
        wanted = [value for value in values if isinstance(value, Tensor)]
        behind = [value for value in (*ctx.saved_tensors, *grads) if isinstance(value, Tensor)]
        refusing = iter(_Refusing.apply(len(wanted), *wanted, *behind))  # type: ignore[no-untyped-call]
        values = [next(refusing) if isinstance(value, Tensor) else value for value in values]
        return tree_unflatten(values, structure)

    return guarded


class _Refusing(torch.autograd.Function):
    """The first `count` tensors, which may not be differentiated with respect to any of all."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_TWICE)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
