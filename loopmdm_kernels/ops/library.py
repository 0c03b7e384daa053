"""The `loopmdm` operator library: what torch.compile sees. Eager calls do not pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from loopmdm_kernels import backends
from loopmdm_kernels.calls import Call, apart, together
from loopmdm_kernels.tracing import once_differentiable, traced
from loopmdm_kernels.version import __version__

NAMESPACE = "loopmdm"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
DEVICES = ("CPU", "CUDA")
PACKAGE = Path(__file__).parents[1]


def installed(folder: Path = PACKAGE) -> str:
    """Names this state of the package: its version, and the sizes and times of its files."""
    digest = blake2b(digest_size=8)
    for path in sorted((*folder.rglob("*.py"), *folder.glob("_C*"))):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{NAMESPACE} {__version__} {digest.hexdigest()}"


# Graphs that torch.compile keeps on disk are found by the names of operators, not by what these return and
# keep for their gradients: those of another state of this package would be taken, and compute nonsense.
torch.compiler.config.cache_key_tag += f";{installed()}"


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
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


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


class Operator:
    """An op, and the operator `loopmdm::NAME` that stands for it where PyTorch must see one."""

    def __init__(
        self,
        call: type[Call],
        schema: str,
        *,
        fake: Callable[[Any], Any],
        flops: Callable[[Any, Any], int],
        run: Callable[[Any], Any] | None = None,
        traced: Callable[[Any, Any], Any] = lambda call, outputs: outputs,
        leaves: Sequence[int] = (),
        backward: Callable[..., Sequence[Tensor | None]] | None = None,
    ) -> None:
        """schema: its arguments are those of `call.arguments`.

        Args:
            fake: outputs without values, of a call without values.
            flops: of the products of a call, given its outputs too.
            run: does a call; None: asks the backends.
            traced: what the operator returns of a call and what `run` returned; its memory is not shared.
            leaves: which arguments have gradients, in the order of `Call.leaves`.
            backward: (call, wanted, grads) -> gradients; None: runs the call again and differentiates it.
        """
        name = schema.split("(", 1)[0]
        self._call, self._leaves = call, leaves
        self._run, self._traced = run or partial(backends.run, name), traced
        self._gradients = backward or self._again
        register(schema, self._forward, lambda *arguments: fake(call.of(*arguments)))
        self._operator = getattr(getattr(torch.ops, NAMESPACE), name)
        self._count = len(self._operator.default._schema.arguments)

        def formula(*arguments: Any, out_val: Any = None) -> int:
            return flops(call.of(*arguments[-self._count :]), out_val)

        register_flop_formula(self._operator, get_raw=True)(formula)
        if leaves:
            arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")]
            register(
                f"{name}_backward(Tensor[] grads, bool[] wanted, {arguments}) -> Tensor[]",
                self._backward,
                self._backward_fake,
            )
            self._backward_operator = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward")
            # As for PyTorch's own operators: the products of the mathematics, whatever is computed again.
            register_flop_formula(self._backward_operator, get_raw=True)(
                lambda *given, out_val=None: 2 * formula(*given)
            )
            torch.library.register_autograd(
                f"{NAMESPACE}::{name}",
                once_differentiable(self._differentiate),
                setup_context=self._setup_context,
                lib=LIBRARY,
            )

    def __call__(self, call: Call) -> Any:
        if traced(call.first):
            return self._operator(*call.arguments())
        return self._run(call)

    def _forward(self, *arguments: Any) -> Any:
        call = self._call.of(*arguments)
        with torch.no_grad():
            return self._traced(call, self._run(call))

    def _backward(self, grads: Sequence[Tensor], wanted: Sequence[bool], *arguments: Any) -> list[Tensor]:
        """The gradients of the leaves; [0] where not wanted."""
        with differentiable():
            found = self._gradients(self._call.of(*arguments), wanted, grads)
        return [grads[0].new_empty(0) if grad is None else grad.contiguous() for grad in found]

    def _again(self, call: Call, wanted: Sequence[bool], grads: Sequence[Tensor]) -> list[Tensor | None]:
        arguments, wants = list(call.arguments()), iter(wanted)

        def leaf(tensor: Tensor | None) -> Tensor | None:
            want = next(wants)
            return None if tensor is None else tensor.detach().requires_grad_(want)

        for index in self._leaves:
            given = arguments[index]
            arguments[index] = [*map(leaf, given)] if isinstance(given, list) else leaf(given)
        call = self._call.of(*arguments)
        outputs = self._run(call)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        leaves = [tensor for tensor in call.leaves if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs[: len(grads)], leaves, grads))
        return [next(found) if want else None for want in wanted]

    def _backward_fake(
        self, grads: Sequence[Tensor], wanted: Sequence[bool], *arguments: Any
    ) -> list[Tensor]:
        leaves = self._call.of(*arguments).leaves
        return [
            leaf.new_empty(leaf.shape) if want and leaf is not None else grads[0].new_empty(0)
            for leaf, want in zip(leaves, wanted, strict=True)
        ]

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.rest = apart(inputs)
        ctx.save_for_backward(*tensors)
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.outputs = sum(out.is_floating_point() for out in outputs)

    def _differentiate(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        needed = [ctx.needs_input_grad[index] for index in self._leaves]
        wanted = [want for needs in needed for want in (needs if isinstance(needs, list) else [needs])]
        arguments = together(ctx.saved_tensors, ctx.rest)
        found = iter(self._backward_operator(list(grads[: ctx.outputs]), wanted, *arguments))
        each = [value if want else None for value, want in zip(found, wanted, strict=True)]
        result: list[Any] = [None] * self._count
        left = iter(each)
        for index, needs in zip(self._leaves, needed, strict=True):
            result[index] = [next(left) for _ in needs] if isinstance(needs, list) else next(left)
        return tuple(result)
