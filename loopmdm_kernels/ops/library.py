"""The `loopmdm` operator library: what torch.compile sees. Eager calls do not pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from loopmdm_kernels.tracing import once_differentiable

LIBRARY = torch.library.Library("loopmdm", "DEF")  # type: ignore[no-untyped-call]
DEVICES = ("CPU", "CUDA")


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], *, random: bool = False
) -> None:
    """Define an operator by its schema, with one implementation for all devices and one for fake tensors.

    `random`: it draws from a generator, so that a compiler may neither repeat nor merge its calls.
    """
    name = schema.split("(", 1)[0]
    tags = (torch.Tag.nondeterministic_seeded,) if random else ()
    LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]
    for device in DEVICES:
        LIBRARY.impl(name, implementation, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"loopmdm::{name}", fake, lib=LIBRARY)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    torch.library.register_autograd(
        f"loopmdm::{name}", once_differentiable(backward), setup_context=setup_context, lib=LIBRARY
    )


@contextmanager
def differentiable() -> Iterator[None]:
    """For an operator's backward, which differentiates its forward pass again.

    Called through a dispatch mode, an operator runs where PyTorch records no derivatives any more.
    """
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def register_flops(name: str, forward: Callable[..., int]) -> None:
    """What FlopCounterMode counts for an operator, given its arguments and `out_val`; for its backward twice.

    As for PyTorch's own operators it is what the products of the mathematics take, two FLOPs a multiply-add,
    whatever is computed again.
    """
    register_flop_formula(getattr(torch.ops.loopmdm, name), get_raw=True)(forward)
    backward = getattr(torch.ops.loopmdm, f"{name}_backward", None)
    if backward is not None:
        arguments = len(getattr(torch.ops.loopmdm, name).default._schema.arguments)
        register_flop_formula(backward, get_raw=True)(
            lambda *args, out_val=None: 2 * forward(*args[-arguments:])  # behind the incoming gradients
        )
