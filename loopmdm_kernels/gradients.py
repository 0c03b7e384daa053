"""A kernel with a backward pass of its own as a function of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.autograd import Function

from loopmdm_kernels.calls import Call, apart, together
from loopmdm_kernels.tracing import once_differentiable

C = TypeVar("C", bound=Call)


class Kept(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    tensors: Sequence[Any] = ()  # or None
    rest: Any = None  # not seen by autograd


def differentiable(
    call: C,
    forward: Callable[[C, Sequence[bool]], tuple[Any, Kept]],
    backward: Callable[[C, Kept, Sequence[bool], Sequence[Tensor]], Sequence[Tensor | None]],
) -> Any:
    """The outputs of forward(call, wanted), whose gradients are backward(call, kept, wanted, grads).

    wanted: of which of `call.leaves`, in whose order gradients are returned. The call that backward is given
    is made again from its operator's arguments.
    """
    # Function's own `apply` looks out for transforms of torch.func first, which see no backend but reference.
    apply = super(Function, _Differentiable).apply
    return apply(call, forward, backward, *call.leaves)  # type: ignore[no-untyped-call]


class _Differentiable(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, forward: Any, backward: Any, *leaves: Tensor | None) -> Any:
        outputs, kept = forward(call, ctx.needs_input_grad[3:])
        tensors, ctx.others = apart(call.arguments())
        ctx.save_for_backward(*tensors, *kept.tensors)
        ctx.kind, ctx.rest, ctx.gradients, ctx.count = type(call), kept.rest, backward, len(tensors)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        call = ctx.kind.of(*together(tensors[: ctx.count], ctx.others))
        kept = Kept(tensors[ctx.count :], ctx.rest)
        # Kernels read memory, not the lazy negative bit; an output that has no gradient gets None.
        grads = tuple([None if grad is None else grad.resolve_neg() for grad in grads])
        return None, None, None, *ctx.gradients(call, kept, ctx.needs_input_grad[3:], grads)
