"""Times tile sizes on the GPU at hand and writes a table of the best, for LOOPMDM_TRITON_TILES.

Nothing gets here by itself: `loopmdm bench --tune TABLE.json` does, or who calls `tune`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.calls import CrossEntropyCall, Draw, SampleCall
from loopmdm_kernels.files import write_file
from loopmdm_kernels.graphs import Capture, CudaGraphs
from loopmdm_kernels.testing import head_inputs, interleaved_medians, row_rng
from loopmdm_kernels.triton import masked_cross_entropy, sample_rows
from loopmdm_kernels.triton.attention import Positions, Result, attention_backward, attention_forward
from loopmdm_kernels.triton.block import Options, Stream, norm_linear, residual_linear
from loopmdm_kernels.triton.config import PRODUCTS, Tiles, default_tiles, key, read_table, trying
from loopmdm_kernels.triton.launch import processor
from loopmdm_kernels.triton.linear import linear, weight_gradient
from loopmdm_kernels.types import Head, RowRng

DTYPE = torch.bfloat16
_PRODUCTS = [
    Tiles(m, n, k, warps, stages)
    for m, n, k, warps, stages in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4))
    if 4096 <= m * n // warps * 4 <= 32768
]
_ATTENTION = [
    Tiles(m, n, 0, warps, stages)
    for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))
]
CANDIDATES = {
    **dict.fromkeys((*PRODUCTS, "vocabulary", "sample"), _PRODUCTS),
    "attention": _ATTENTION,
}
_GAIN = 1.03  # less than this may be noise: the default stays
_AT_ONCE = 10  # calls that are timed together, so that the host does not limit them


class Workload(NamedTuple):
    """Sizes to tune for."""

    hidden: int
    heads: int
    vocab_size: int
    batches: tuple[tuple[int, int], ...]  # batch and length
    rows: int  # that are drawn at once


class Problem(NamedTuple):
    """A call of one kernel, whose tiles `config.tiles` is asked for by this name and shape."""

    kernel: str
    shape: tuple[int, ...]
    call: Callable[[], Any]


def tune(
    path: Path,
    workload: Workload,
    device: torch.device,
    *,
    candidates: Mapping[str, Sequence[Tiles]] = CANDIDATES,
    repeats: int = 15,
    report: Callable[[str], None] = print,
) -> dict[str, Tiles]:
    """Adds the best tiles for `workload` to the table `path`, those that it has already left alone.

    The table is written after each problem, so a run that was interrupted goes on where it was.
    """
    table = read_table(path) if path.is_file() else {}
    here = processor(device)
    for problem in problems(workload, device):
        name = key(problem.kernel, problem.shape, DTYPE, here.arch)
        if name in table:
            continue
        default = default_tiles(problem.kernel, problem.shape, DTYPE, here)
        capture = CudaGraphs(device) if device.type == "cuda" else None
        calls = {}
        for tile in (default, *candidates[problem.kernel]):
            call = _ready(problem.call, {name: tile}, capture)
            if call is not None:
                calls[str(tuple(tile))] = (tile, call)
        medians = interleaved_medians(
            {label: call for label, (_, call) in calls.items()}, repeats=repeats, warmup=1
        )
        best = min(medians, key=lambda label: medians[label])
        gain = medians[str(tuple(default))] / medians[best]
        table[name] = calls[best][0] if gain >= _GAIN else default
        _write(table, path)
        report(f"{name}: {tuple(table[name])}, {max(gain, 1.0):.2f} times the speed of the default")
    return table


def problems(workload: Workload, device: torch.device) -> Iterator[Problem]:
    """Every kernel with tiles, at the shapes that training and sampling meet."""
    hidden, heads, vocab_size, batches, num_rows = workload
    for batch, length in batches:
        yield from _block_problems(batch, length, hidden, heads, device)
    batch, length = batches[0]
    x, wide = head_inputs(batch, length, hidden, vocab_size, excluded_token=vocab_size - 1)
    norm, weight, bias, modulation = (t.to(device, DTYPE) for t in wide.tensors)
    x, head = x.float().to(device), Head(norm, weight, bias, modulation, wide.excluded_token)
    rows = torch.arange(min(num_rows, batch * length), device=device)
    names = RowRng(0, *(name.to(device) for name in row_rng(rows.shape[0])[1:]))
    targets = torch.zeros(batch, length, dtype=torch.int64, device=device)
    every = torch.arange(0, batch * length, 2, device=device)
    weights = torch.ones(every.shape[0], device=device, dtype=torch.float32)
    shape = (vocab_size, hidden)
    loss = CrossEntropyCall(x, head, None, targets, every, weights)
    yield Problem("vocabulary", shape, lambda: masked_cross_entropy.run(loss))
    sampled = SampleCall(x, head, None, rows, Draw(names))
    yield Problem("sample", shape, lambda: sample_rows.run(sampled))


def _block_problems(
    batch: int, length: int, hidden: int, heads: int, device: torch.device
) -> Iterator[Problem]:
    rows, wide = batch * length, 4 * hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(DTYPE)

    angle = torch.rand(length, hidden // heads // 2, device=device, dtype=torch.float32).to(DTYPE)
    options = Options(heads, length, 0, Positions(None, angle.cos(), angle.sin()), DTYPE)
    stream = Stream.of(torch.randn(rows, hidden, device=device, dtype=torch.float32))
    modulation, norm = normal(1, 2, hidden), torch.ones(hidden, device=device, dtype=torch.float32)
    narrow, broad = normal(rows, hidden), normal(rows, wide)
    for columns in (3 * hidden, wide):
        weight, gradient, out = (
            normal(columns, hidden),
            normal(rows, columns),
            torch.zeros(columns, hidden, device=device, dtype=torch.float32),
        )
        is_mlp = columns == wide

        def forward(weight: Tensor = weight, is_mlp: bool = is_mlp) -> Any:
            return norm_linear(
                stream, norm, modulation[:, 0:2], weight, None, options, None, gelu=is_mlp, keep=False
            )

        yield Problem("norm_linear", (rows, columns, hidden), forward)
        yield from _gradients(gradient, weight, narrow, out)
    for a in (narrow, broad):
        weight = normal(hidden, a.shape[1])

        def back(a: Tensor = a, weight: Tensor = weight) -> Any:
            return residual_linear(
                a, weight, None, modulation[:, 0], stream, options, (0, 0), None, None, keep=False
            )

        yield Problem("residual_linear", (rows, hidden, a.shape[1]), back)
        yield from _gradients(
            narrow, weight, a, torch.zeros(hidden, a.shape[1], device=device, dtype=torch.float32)
        )
    yield from _attention_problems((batch, length, heads, hidden // heads), options, device)


def _gradients(grad: Tensor, weight: Tensor, operand: Tensor, out: Tensor) -> Iterator[Problem]:
    """The products of the backward pass of grad = d(operand weight^T)."""
    rows, (columns, depth) = grad.shape[0], weight.shape
    yield Problem("linear", (rows, depth, columns), lambda: linear(grad, weight, transposed=True))
    yield Problem(
        "weight_gradient",
        (columns, depth, rows),
        lambda: weight_gradient(grad, operand, out, accumulate=True),
    )


def _attention_problems(
    shape: tuple[int, int, int, int], options: Options, device: torch.device
) -> Iterator[Problem]:
    tensors = torch.randn(5, *shape, device=device, dtype=torch.float32).to(DTYPE).transpose(2, 3)
    q, k, v, out, grad = tensors.unbind()
    grads = torch.empty_like(tensors[:3]).unbind()
    positions, result = options.positions, Result.empty(out, keep=True)

    def forward() -> None:
        attention_forward(q, k, v, positions, result)

    def backward() -> None:
        attention_backward(q, k, v, positions, result, grad, grads)

    forward()  # what the backward pass reads
    yield Problem("attention", (shape[1], shape[3], 0), forward)
    yield Problem("attention", (shape[1], shape[3], 1), backward)


def _ready(
    call: Callable[[], Any], table: dict[str, Tiles], capture: Capture | None
) -> Callable[[], Any] | None:
    """Some calls with these tiles, compiled, as one graph; None if the processor has not enough for them."""
    from triton.runtime.errors import OutOfResources

    try:
        with trying(table):
            call()
    except OutOfResources:
        return None

    def some() -> None:
        with trying(table):
            for _ in range(1 if capture is None else _AT_ONCE):
                call()

    if capture is None:
        return some
    return capture(some)


def _write(table: Mapping[str, Tiles], path: Path) -> None:
    write_file(path, json.dumps(table, indent=1) + "\n")
