"""Launches of the kernels as the host prepares them, small ones, for a walk through their PTX."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import builds
import head_kernels
import hopper
import pytest
import torch
from walk import Launch

from loopmdm_kernels.cuda import launch, looped_blocks, looped_blocks_backward, looped_rows, tensor_maps
from loopmdm_kernels.cuda.parameters import MAP
from loopmdm_kernels.cuda.targets import SM90
from loopmdm_kernels.cuda.weights import PackedWeights
from loopmdm_kernels.schedule import BlockShape, Plan, build, choose, choose_backward
from loopmdm_kernels.schedule.cost import KEY_BLOCKS, STEP, key_block
from loopmdm_kernels.schedule.rows import ROWS, places
from loopmdm_kernels.testing import head_inputs, row_rng
from loopmdm_kernels.types import Head
from tests.cuda import emulated, emulated_head

ATOM = 1024  # bytes; dynamic shared memory begins inside of the second one
LOOPS = 2
_CPU = torch.device("cpu")


def _box(described: tensor_maps.Layout) -> int:
    return described.box[0] * described.box[1] * described.dtype.itemsize


def _words(tensors: Iterable[torch.Tensor]) -> dict[int, bytes]:
    return {tensor.data_ptr(): tensor.numpy().tobytes() for tensor in tensors}


def _weights(shape: Any) -> PackedWeights:
    """Never read: only their sizes count."""

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(shape.layers, *sizes, dtype=torch.bfloat16)

    hidden, mlp = shape.hidden, shape.mlp
    matrices = empty(3 * hidden, hidden), empty(hidden, hidden), empty(mlp, hidden), empty(hidden, mlp)
    vectors = (torch.zeros(shape.layers, *sizes) for sizes in ((2, hidden), (mlp,), (hidden,)))
    return PackedWeights(matrices[0], *matrices, *vectors)


def _one_of_each(items: Iterable[Any], number: int = 1) -> tuple[Any, ...]:
    """The first instructions of each phase of the first layer."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        if item.layer == 0:
            found.setdefault(item.phase, []).append(item)
    return tuple(item for of_phase in found.values() for item in of_phase[:number])


def _of_more_keys(shape: BlockShape, plan: Plan) -> BlockShape | None:
    """Of several blocks of keys, where this shape has one and its kernel is for others as well."""
    one = shape.length <= key_block(shape, plan.tiles) == KEY_BLOCKS[-1]
    return shape._replace(length=2 * KEY_BLOCKS[-1]) if one else None


def forward(name: str) -> list[Launch]:
    """A block that does two tiles of each phase, twice."""
    shape = hopper.SHAPES[name]
    plan = choose(shape, hopper.HOPPER)
    longer = _of_more_keys(shape, plan)
    return [_forward(each, plan) for each in (shape, longer) if each]


def _forward(shape: BlockShape, plan: Plan) -> Launch:
    table = build(shape, plan.tiles)
    table = table._replace(
        enter=_one_of_each(table.enter),
        loop=_one_of_each(table.loop, 2),
        leave=_one_of_each(table.leave),
    )
    words, packed = table.encode(), _weights(shape)
    x = torch.empty(shape.batch, shape.length, shape.hidden)
    modulation = torch.empty(shape.layers, 1, 6, shape.hidden)
    buffers = looped_blocks.Buffers.allocate(table, x, packed, modulation, LOOPS, None, None)
    buffers.stop.fill_(LOOPS)
    parameters = looped_blocks.pack_parameters(SM90, table, buffers, packed, words, None)
    layouts = looped_blocks.map_layouts(shape, plan, buffers, packed)
    boxes = {getattr(SM90.parameters, field).offset: _box(each) for field, each in layouts.items()}
    return Launch(bytes(parameters), boxes, plan.blocks, plan.blocks, _words((words, buffers.stop)))


def rows(name: str) -> list[Launch]:
    """A sequence of a cluster of two blocks: all of its loops, and where it may stop, the first one."""
    shape, plan = builds.ROWS_SHAPES[name], builds.rows_plan(name)
    packed, x = _weights(shape), torch.empty(shape.batch, shape.length, shape.hidden)
    modulation, loops = torch.empty(shape.layers, 1, 6, shape.hidden), LOOPS + 1
    buffers = looped_rows.Buffers.allocate(plan, x, packed, modulation, loops, None, None)
    buffers.stop.fill_(loops)
    layouts = looped_rows.map_layouts(plan, buffers, packed)
    boxes = {getattr(looped_rows.Parameters, field).offset: _box(each) for field, each in layouts.items()}
    # Queries; rows, and weights of attention or activations.
    beside, at = ATOM * 2 + plan.stages * plan.stage_bytes, places(shape, plan.blocks, plan.groups)
    operand = 128 * ROWS * shape.hidden // STEP
    made = {
        *range(beside + at.queries, beside + at.queries + operand),
        *range(beside + at.rows, beside + at.wide + 128 * ROWS * shape.mlp // STEP),
    }
    return [
        Launch(
            bytes(looped_rows.pack_parameters(buffers, exit_threshold)),
            boxes, plan.blocks, plan.blocks, _words((buffers.stop,)), plan.threads, made,
            rare=1,  # the decision
        )
        for exit_threshold in (None, 0.1)
    ]  # fmt: skip


def backward(name: str) -> list[Launch]:
    shape = builds.BACKWARD_SHAPES[name]
    plan = choose_backward(shape)
    longer = _of_more_keys(shape, plan)
    return [_backward(each, plan) for each in (shape, longer) if each]


def _backward(shape: BlockShape, plan: Plan) -> Launch:
    table, _, counters = looped_blocks_backward._table(shape, plan.tiles, _CPU)
    table = table._replace(loop=_one_of_each(table.loop, 2))
    words, packed = table.encode(), _weights(shape)
    x = torch.empty(LOOPS, shape.batch, shape.length, shape.hidden)
    stop = torch.full((shape.batch + 1,), LOOPS, dtype=torch.int32)
    affine = torch.zeros(shape.layers, 1, 2, shape.hidden // 2, 4)
    gate = torch.zeros(shape.layers, 1, 2, shape.hidden)
    kept = looped_blocks_backward.Kept(x, stop, affine, gate, None, None, None, packed, shape.heads)
    buffers = looped_blocks_backward.allocate(table, kept, x[0], counters)
    parameters = looped_blocks_backward.pack_parameters(table, buffers, words)
    layouts = looped_blocks_backward.map_layouts(buffers, packed)
    boxes = {getattr(type(parameters), field).offset: _box(each) for field, each in layouts.items()}
    return Launch(bytes(parameters), boxes, plan.blocks, plan.blocks, _words((words, buffers["stop"])))


def of_head(folder: Path) -> dict[str, Launch]:
    """Of each kernel of the head, by name: what the ops launch for few rows and for many."""
    found: dict[str, Launch] = {}

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def launch_in_order(
            self,
            blocks: int,
            threads: int,
            stream: int,
            parameters: ctypes.Structure,
            *,
            early: bool,
            cluster: int,
        ) -> None:
            found[self.name] = Launch(bytes(parameters), _boxes(parameters), blocks, cluster, {})

    def loaded(source: str, macros: Any, *_: object) -> Noted:
        (name,) = (
            n for n, k in head_kernels.KERNELS.items() if (k.source, k.macros) == (source, tuple(macros))
        )
        return Noted(name)

    with emulated_head.emulation(folder) as state, pytest.MonkeyPatch.context() as patch:
        state.multiprocessors = 2  # one pair of blocks
        patch.setattr(launch, "loaded", loaded)
        for number in (100, 300):  # a tile of 64 rows, pairs of 128
            hidden, head = head_inputs(1, number, 320, 600, seed=3)
            leaves = [hidden.float(), *(t.to(torch.bfloat16) for t in head[:4])]
            rows, weights = torch.arange(number), torch.ones(number)
            leaves = [leaf.requires_grad_() for leaf in leaves]
            total, _ = emulated.on_cuda("masked_cross_entropy")(
                leaves[0], Head(*leaves[1:]), torch.zeros(1, number, dtype=torch.long), rows, weights
            )
            torch.autograd.grad(total, leaves)
            with torch.no_grad():
                emulated.on_cuda("sample_rows")(leaves[0], Head(*leaves[1:]), rows, row_rng(number, 0))
                emulated.on_cuda("head_logits")(leaves[0], Head(*leaves[1:]))
    return found


def _boxes(parameters: ctypes.Structure) -> dict[int, int]:
    """As the emulation's `encode` has written them into the maps."""
    found = {}
    for name, kind in parameters._fields_:
        start = getattr(type(parameters), name).offset
        if kind is MAP:
            words = (ctypes.c_uint64 * 16).from_buffer_copy(getattr(parameters, name))
            _, size, *_, columns, rows = words[:9]
            found[start] = columns * rows * size
        elif hasattr(kind, "_fields_"):
            found |= {start + place: box for place, box in _boxes(getattr(parameters, name)).items()}
    return found
