"""What is timed: the ops at the sizes of a model, as calls without arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels.calls import CrossEntropyCall, Draw, LoopedCall, SampleCall
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import BlockWeights, Head, Rotary, RowRng

VOCABULARY = 50_258
BLOCKS = 2


class Sizes(NamedTuple):
    hidden_size: int
    num_heads: int
    batch: int
    length: int
    loops: int
    rows: int
    dtype: torch.dtype


class Case(NamedTuple):
    name: str
    shape: str
    op: str
    call: Callable[[], Any]  # of the public op
    by: Callable[[Callable[[Any], Any]], Callable[[], Any]]  # the same by a function of the op's call alone
    traffic: int  # bytes that it has to move at least: what it reads and what it returns, once


def on_backend(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with lk.use_backend(backend):
            return call()

    return run


def cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """One call of each op that a model's time goes to, and the gradients of those that are trained."""
    return [
        looped_blocks(sizes, device),
        looped_blocks(sizes, device, gradients=True),
        masked_cross_entropy(sizes, device),
        sample_rows(sizes, device),
    ]


def looped_blocks(
    sizes: Sizes, device: torch.device, *, gradients: bool = False, recompute: bool = False
) -> Case:
    hidden_size, heads, batch, length, num_loops, _, dtype = sizes
    inputs = looped_inputs(batch, length, hidden_size, heads, BLOCKS).to(dtype)
    blocks = [BlockWeights(*(w.to(device) for w in block)) for block in inputs.blocks]
    x, modulation = inputs.x.to(device), inputs.modulation.to(device)
    assert inputs.rotary is not None
    rotary = Rotary(*(angle.to(device) for angle in inputs.rotary))

    def loops() -> Tensor:
        out = lk.looped_blocks(
            x, blocks, modulation, num_loops, num_heads=heads, rotary=rotary, recompute=recompute
        )
        assert isinstance(out, Tensor)
        return out

    value = LoopedCall(x, blocks, modulation, num_loops, heads, rotary=rotary)
    shape = f"x [{batch}, {length}, {hidden_size}], {BLOCKS} blocks, S {num_loops}"
    leaves = [x, modulation, *(weight for block in blocks for weight in block)]
    read, op = _bytes(leaves), "looped_blocks"
    if not gradients:
        return Case(op, shape, op, loops, lambda run: lambda: run(value)[0], read + x.nbytes)
    return Case(
        f"{op}, gradients",
        shape,
        op,
        _gradients(loops, leaves),
        lambda run: _gradients(lambda: run(value)[0], leaves),
        2 * read + x.nbytes,
    )


def masked_cross_entropy(sizes: Sizes, device: torch.device) -> Case:
    hidden, head = _head(sizes, device)
    batch, length = hidden.shape[:2]
    masked = torch.arange(0, batch * length, 2, device=device)
    targets = torch.zeros(batch, length, dtype=torch.int64, device=device)
    weights = torch.ones(masked.shape[0], device=device)

    def loss() -> Tensor:
        return lk.masked_cross_entropy(hidden, head, targets, masked, weights)[0]

    value = CrossEntropyCall(hidden, head, None, targets, masked, weights)
    leaves = [hidden, *head.tensors]
    return Case(
        "masked_cross_entropy, gradients",
        f"{len(masked)} of {batch * length} rows, D {sizes.hidden_size}, V {VOCABULARY}",
        "masked_cross_entropy",
        _gradients(loss, leaves),
        lambda run: _gradients(lambda: run(value)[0], leaves),
        2 * _bytes(leaves),
    )


def sample_rows(sizes: Sizes, device: torch.device) -> Case:
    hidden, head = _head(sizes, device)
    rows = torch.arange(min(sizes.rows, sizes.batch * sizes.length), device=device)
    names = RowRng(0, *(name.to(device) for name in row_rng(rows.shape[0])[1:]))
    value = SampleCall(hidden, head, None, rows, Draw(names))
    return Case(
        "sample_rows",
        f"{len(rows)} rows, D {sizes.hidden_size}, V {VOCABULARY}",
        "sample_rows",
        lambda: lk.sample_rows(hidden, head, rows, names),
        lambda run: lambda: run(value),
        _bytes(head.tensors) + len(rows) * hidden[0, 0].nbytes,
    )


def _head(sizes: Sizes, device: torch.device) -> tuple[Tensor, Head]:
    hidden, wide = head_inputs(
        sizes.batch, sizes.length, sizes.hidden_size, VOCABULARY, excluded_token=VOCABULARY - 1
    )
    norm, weight, bias, modulation = (t.to(device, sizes.dtype) for t in wide.tensors)
    return hidden.float().to(device), Head(norm, weight, bias, modulation, wide.excluded_token)


def _gradients(result: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        try:
            for leaf in leaves:
                leaf.requires_grad_()
            return torch.autograd.grad(result().sum(), leaves)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)

    return run


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
