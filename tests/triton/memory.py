"""Triton's interpreter with its memory looked after: which elements each program of a launch touches.

The kernels get addresses at which nothing lies. Each tensor of a launch has a span of them to itself, so that
an address tells which argument it was made from, however far it strays. Before the tensor is touched, every
lane that the mask lets through is looked up in its shape and strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

SPAN = 2**44  # bytes of addresses, in the middle of which a tensor begins
NOBODY, SEVERAL = -1, -2  # in the place of a program
TOUCHES = ("reads", "writes", "adds to")


class MemoryFault(AssertionError):
    """A program touches what it was not given, or what is another program's."""


class Argument(NamedTuple):
    """A tensor of a launch, at an address that was made up."""

    name: str
    tensor: Tensor
    base: int

    def elements(self, addresses: np.ndarray, touch: str) -> np.ndarray:
        """How many elements from its first one on these addresses are, each of which must be its own."""
        size, (offsets, odd) = self.tensor.element_size(), (addresses.astype(np.int64) - self.base, 0)
        offsets, odd = offsets // size, offsets % size
        rest, inside = offsets, (odd == 0) & (offsets >= 0) & (self.tensor.numel() > 0)
        for extent, stride in self.dimensions():
            inside = inside & (rest // stride < extent)
            rest = rest % stride
        inside &= rest == 0
        if not inside.all():
            shape, stride = tuple(self.tensor.shape), self.tensor.stride()
            outside = sorted({int(offset) for offset in offsets[~inside]})
            raise MemoryFault(
                f"{touch} {self.name} {shape} with strides {stride} at elements {outside[:4]} from its first"
            )
        return offsets

    def dimensions(self) -> list[tuple[int, int]]:
        """Extents and strides of what has more than one element, outermost first."""
        found = [(n, s) for n, s in zip(self.tensor.shape, self.tensor.stride(), strict=True) if n > 1]
        found.sort(key=lambda dimension: -dimension[1])
        reach = 1
        for extent, stride in reversed(found):
            assert stride >= reach, f"{self.name}: elements overlap, {found}"
            reach = stride * extent
        return found


class Owners:
    """Of each byte of a storage: the program that read, wrote or atomically added to the element there."""

    def __init__(self, size: int) -> None:
        self._by = {touch: np.full(size, NOBODY) for touch in TOUCHES}

    def touch(self, touch: str, where: np.ndarray, program: int) -> bool:
        """Whether this may come before, between or after what others have done, and what this program wrote.

        Readers may meet, and so may atomic sums. A program may write what it has read, once; the lanes of a
        block that wrote a number are not those that read it back or write it again.
        """
        read, written, added = (by[where] for by in self._by.values())
        fine = written == NOBODY
        if touch != "adds to":
            fine &= added == NOBODY
        if touch != "reads":
            fine &= (read == NOBODY) | (read == program)
        mine = self._by[touch]
        mine[where] = np.where((mine[where] == NOBODY) | (mine[where] == program), program, SEVERAL)
        return bool(fine.all())

    def changed(self) -> bytes:
        return ((self._by["writes"] != NOBODY) | (self._by["adds to"] != NOBODY)).tobytes()


class Launch:
    """A launch of an interpreted kernel, with the memory that it found."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]):
        self.kernel, self.grid, self.args, self.options = kernel, grid, args, options
        tensors = [value for value in args if isinstance(value, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self._found = [(storage, storage.clone()) for storage in storages.values()]
        self._arguments: list[Argument] = []
        self._owners = {storage.data_ptr(): Owners(storage.nbytes()) for storage, _ in self._found}

    @property
    def kind(self) -> str:
        """Launches of one kind run through the same lines of a kernel, but for numbers."""
        absent = [
            name for name, value in zip(self.kernel.arg_names, self.args, strict=False) if value is None
        ]
        return f"{self.kernel.__name__} {absent} {self.options}"

    def again(self) -> None:
        """Runs as it ran, from the memory that it found."""
        for storage, found in self._found:
            storage.copy_(found)
        self.kernel.run(*self.args, grid=self.grid, warmup=False, **self.options)

    def changed(self) -> list[bytes]:
        """Where programs wrote to each storage, a byte for a byte."""
        return [owners.changed() for owners in self._owners.values()]

    def take(self, tensor: Tensor) -> int:
        """The address that a kernel gets for it."""
        names = dict(zip(self.kernel.arg_names, self.args, strict=False))
        name = next(
            name
            for name, given in names.items()
            if isinstance(given, Tensor)
            and (given.data_ptr(), given.shape, given.stride())
            == (tensor.data_ptr(), tensor.shape, tensor.stride())
        )
        base = (len(self._arguments) + 1) * SPAN + SPAN // 2
        self._arguments.append(Argument(name, tensor, base))
        return base

    def real(self, builder: Any, touch: str, pointers: Any, mask: np.ndarray) -> Any:
        """Where the active lanes' elements are in memory; all are checked."""
        addresses = np.array(pointers.data)
        mask = np.broadcast_to(mask, addresses.shape).astype(bool)
        active = addresses[mask]
        addresses[~mask] = 0
        if active.size:
            addresses[mask] = self._checked(builder.grid_idx, touch, active)
        return interpreter.TensorHandle(addresses, pointers.dtype)

    def _checked(self, place: tuple[int, ...], touch: str, addresses: np.ndarray) -> np.ndarray:
        program = place[0] + self.grid[0] * (place[1] if len(self.grid) > 1 else 0)
        who = f"{self.kernel.__name__}: program {place} {touch}"
        span, last = int(addresses.min() // SPAN), int(addresses.max() // SPAN)
        if span != last or not 0 < span <= len(self._arguments):
            raise MemoryFault(f"{who} addresses of no argument")
        argument = self._arguments[span - 1]
        elements = argument.elements(addresses, who)
        if touch == "writes" and len(np.unique(elements)) < len(elements):
            raise MemoryFault(f"{who} an element of {argument.name} twice")
        real = argument.tensor.data_ptr() + elements * argument.tensor.element_size()
        begin = argument.tensor.untyped_storage().data_ptr()
        if not self._owners[begin].touch(touch, real - begin, program):
            raise MemoryFault(f"{who} elements of {argument.name} that are written elsewhere, or here before")
        return real.astype(np.uint64)


@contextmanager
def watched() -> Iterator[list[Launch]]:
    """Inside, interpreted kernels are looked after; yields the launches. A fault ends the launch."""
    launches: list[Launch] = []
    running: list[Launch] = []
    run, convert = interpreter.InterpretedFunction.run, interpreter._implicit_cvt
    builder = interpreter.InterpreterBuilder

    def run_watched(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, grid, args, options))
        running.append(launches[-1])
        try:
            run(kernel, *args, grid=grid, warmup=warmup, **options)
        finally:
            running.pop()

    def converted(value: Any) -> Any:
        made = convert(value)
        if isinstance(value, Tensor):
            made.handle.data = np.array([running[-1].take(value)], dtype=np.uint64)
        return made

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return load(self, running[-1].real(self, "reads", pointers, mask.data), mask, *rest, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, running[-1].real(self, "writes", pointers, mask.data), value, mask, *rest)

    def atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        real = running[-1].real(self, "adds to", pointers, mask.data)
        return update(self, op, real, value, mask, *rest)

    load, store, update = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", run_watched)
        patch.setattr(interpreter, "_implicit_cvt", converted)
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        patch.setattr(builder, "create_atomic_rmw", atomic)
        yield launches


class Filled(TorchFunctionMode):  # a dispatch mode would not see what an op of this package makes
    """Inside, memory that nobody has written to holds NaN and the largest numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" in func.__name__ and isinstance(out, Tensor):
            with torch.no_grad():
                return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)
        return out
