"""`looped_blocks` by one cooperative launch: the whole stack, all loops; its gradients by another."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.cuda import driver, looped_rows, prepare, tensor_maps
from loopmdm_kernels.cuda.launch import Breach, Kernel, keep_for_graphs, known_device, loaded, set_map
from loopmdm_kernels.cuda.looped_blocks_backward import CAPABILITY, HEAD_DIMS, Kept, gradients, kernel_on
from loopmdm_kernels.cuda.parameters import MAP, address, defines, fields
from loopmdm_kernels.cuda.prepare import most_loops, of_call
from loopmdm_kernels.cuda.streams import Shared
from loopmdm_kernels.cuda.targets import Target, target_of
from loopmdm_kernels.cuda.weights import MATRICES, PackedWeights, packed
from loopmdm_kernels.gradients import Kept as Saved
from loopmdm_kernels.gradients import differentiable
from loopmdm_kernels.schedule import (
    BlockShape,
    Device,
    Plan,
    Table,
    Tiles,
    build,
    choose,
)
from loopmdm_kernels.schedule.cost import block_rows, sides
from loopmdm_kernels.schedule.forward import STATISTICS_COLUMNS
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Rotary

_REMEMBERED = 128  # a graph is captured with what its call made before: 32 calls of a sampler, 4 stacks each


def why_not(call: LoopedCall) -> str | None:
    if call.x.dtype != torch.float32:
        return f"x must be float32, got {call.x.dtype}"
    if call.dtype != torch.bfloat16:
        return f"compute_dtype must be bfloat16, got {call.dtype}"
    if call.dropout:
        return "it has no dropout"
    capability, head_dim, trains = torch.cuda.get_device_capability(call.x.device), call.head_dim, call.trains
    target = target_of(capability)
    if head_dim not in target.head_dims:
        return f"the head size must be one of {target.head_dims}, got {head_dim}"
    if trains and head_dim not in HEAD_DIMS:
        without = "call it under torch.no_grad()"
        return f"its backward pass has heads of size {HEAD_DIMS}, got {head_dim}; {without}"
    if trains and capability != CAPABILITY:
        return "its backward pass needs compute capability 9.0 (H100, H200); call it under torch.no_grad()"
    shape = shape_of(call.x, call.blocks, call.num_heads)
    with torch.cuda.device(call.x.device):
        return _why_no_kernel(shape, target, call.x.device.index, trains)


@lru_cache(maxsize=_REMEMBERED)
def _why_no_kernel(shape: BlockShape, target: Target, device: int, trains: bool) -> str | None:
    """No tiles divide the widths, or the code of a kernel is not what it is written to be."""
    try:
        prepare.kernel_on(target, device)
        if looped_rows.kernel_on(shape, target, device) is None:
            _kernel(shape, target, device)
        if trains:
            kernel_on(shape, device)
    except (ValueError, Breach) as error:
        return str(error)
    return None


def run(call: LoopedCall) -> tuple[Tensor, Tensor | None]:
    """Backward always runs the loops again: only their inputs are kept, whatever `recompute` says."""
    if call.trains:
        out, used = differentiable(call, _with_inputs, _backward)
        return out, used
    buffers, _ = run_forward(call)
    return _outputs(call, buffers)


def _outputs(call: LoopedCall, buffers: AllBuffers) -> tuple[Tensor, Tensor | None]:
    """The second only where it is not known before: a cast is a node of a graph."""
    return buffers.output, None if call.exit_threshold is None else buffers.stop[: len(call.x)].long()


def _with_inputs(call: LoopedCall, _: Sequence[bool]) -> tuple[tuple[Tensor, Tensor | None], Saved]:
    buffers, weights = run_forward(call, keep=True)
    kept = kept_of(buffers, weights, call.num_heads)
    return _outputs(call, buffers), Saved(rest=kept)


def _backward(call: LoopedCall, kept: Saved, _: Sequence[bool], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    grad_x, grad_blocks, grad_modulation = gradients(kept.rest, grads[0], call.plain_blocks, call.modulation)
    return grad_x, *(tensor for block in grad_blocks for tensor in block), grad_modulation


def kept_of(buffers: AllBuffers, weights: PackedWeights, num_heads: int) -> Kept:
    assert buffers.stream_values is not None
    return Kept(
        buffers.stream_values, buffers.stop, buffers.affine, buffers.gate,
        buffers.cosines, buffers.sines, buffers.key_mask, weights, num_heads,
    )  # fmt: skip


def run_forward(call: LoopedCall, *, keep: bool = False) -> tuple[AllBuffers, PackedWeights]:
    """One call of the kernel; with `keep` its stream holds the inputs of all loops."""
    x, shape = call.x, shape_of(call.x, call.blocks, call.num_heads)
    target, device = target_of(torch.cuda.get_device_capability(x.device)), x.device.index
    with torch.cuda.device(x.device):
        weights = packed(call.plain_blocks)
        rows = looped_rows.kernel_on(shape, target, device)
        run = (
            _by_tiles(call, shape, target, weights, keep)
            if rows is None
            else _by_rows(call, rows, weights, keep)
        )
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _prepare(call, target, run.counted, run.buffers, weights, stream)
        for name, described in run.maps.items():
            set_map(run.parameters, name, described)
        driver.set_aside_l2(device)
        kept = driver.l2_window(weights.buffer.data_ptr(), 2 * weights.buffer.numel(), driver.facts(device))
        run.kernel.launch(
            run.blocks,
            run.threads,
            stream,
            run.parameters,
            kept,
            cluster=run.cluster,
            cooperative=run.together,
        )
    return run.buffers, weights


class _Run(NamedTuple):
    """A launch of either kernel."""

    kernel: driver.Kernel
    blocks: int
    threads: int
    cluster: int
    together: bool  # all blocks wait for each other, not only those of a cluster
    counted: prepare.Counted
    buffers: AllBuffers
    parameters: ctypes.Structure
    maps: dict[str, tensor_maps.Layout]


def _by_tiles(
    call: LoopedCall, shape: BlockShape, target: Target, weights: PackedWeights, keep: bool
) -> _Run:
    device, given = call.x.device, (call.modulation, call.num_loops, call.rotary, call.key_mask)
    kernel, plan, limits = _kernel(shape, target, device.index)
    table, shared = _shared_table(shape, plan.tiles, call.exit_threshold is not None, device)
    (words,) = shared.read()
    keep_for_graphs(words)
    buffers = Buffers.allocate(table, call.x, weights, *given, keep=keep)
    parameters = pack_parameters(target, table, buffers, weights, words, call.exit_threshold)
    described = fields(target.parameters, MAP)
    maps = map_layouts(shape, plan, buffers, weights) if described else {}
    if plan.blocks > 1:
        blocks = plan.blocks * kernel.active_clusters(plan.blocks, target.threads)
    else:
        blocks = limits.sms * kernel.blocks_per_sm(target.threads)
    counted = counters_of(table)
    return _Run(kernel, blocks, target.threads, plan.blocks, True, counted, buffers, parameters, maps)


def _by_rows(call: LoopedCall, found: looped_rows.Found, weights: PackedWeights, keep: bool) -> _Run:
    kernel, plan, clusters = found
    given = (call.modulation, call.num_loops, call.rotary, call.key_mask)
    buffers = looped_rows.Buffers.allocate(plan, call.x, weights, *given, keep=keep)
    blocks = plan.blocks * min(len(call.x), clusters)
    counted = looped_rows.counters_of(len(call.x), adaptive=call.exit_threshold is not None)
    parameters = looped_rows.pack_parameters(buffers, call.exit_threshold)
    maps = looped_rows.map_layouts(plan, buffers, weights)
    return _Run(kernel, blocks, plan.threads, plan.blocks, False, counted, buffers, parameters, maps)


def counters_of(table: Table) -> prepare.Counted:
    return prepare.Counted(table.shape.batch, table.num_counters, table.adaptive)


def _prepare(
    call: LoopedCall,
    target: Target,
    counted: prepare.Counted,
    buffers: AllBuffers,
    weights: PackedWeights,
    stream: int,
) -> None:
    """Brings the weights up to date and writes what the kernel begins with, by one launch."""
    modulation = prepare.modulation_for_kernel(call.modulation)
    arguments = prepare.arguments_of(counted, weights, modulation, call.num_loops, **prepare.written(buffers))
    kernel, blocks = prepare.kernel_on(target, call.x.device.index), prepare.blocks_of(arguments)
    with weights.writing():
        kernel.launch_in_order(blocks, prepare.THREADS, stream, arguments, early=False)


def kernel_of(shape: BlockShape, target: Target, device: Device) -> Kernel:
    """What runs the forward pass on such a GPU, where it has room for the clusters."""
    if rows := looped_rows.plan_of(shape, target, device):
        return looped_rows.kernel_of(shape, rows)
    plan = choose(shape, device)
    macros = tuple(defines(shape, plan).items())
    return Kernel(target.source, target.threads, plan.shared_bytes, macros, plan.blocks)


def shape_of(x: Tensor, blocks: Sequence[BlockWeights | Fp8BlockWeights], num_heads: int) -> BlockShape:
    batch, length, hidden = x.shape
    return BlockShape(batch, length, hidden, num_heads, blocks[0].mlp_in.shape[0], len(blocks))


@lru_cache(maxsize=_REMEMBERED)
def _kernel(shape: BlockShape, target: Target, device: int) -> tuple[driver.Kernel, Plan, driver.Facts]:
    limits = driver.facts(device)
    known = target.used_of(known_device(limits))
    plan = choose(shape, known)
    kernel = _loaded(target, shape, plan, device)
    while plan.blocks > 1 and not kernel.active_clusters(plan.blocks, target.threads):
        # No part of this GPU has so many SMs. Sums are those of other batches, which may have other tiles.
        plan = choose(shape, known._replace(cluster=plan.blocks // 2), plan.tiles.mlp_out_parts)
        kernel = _loaded(target, shape, plan, device)
    return kernel, plan, limits


def _loaded(target: Target, shape: BlockShape, plan: Plan, device: int) -> driver.Kernel:
    macros = tuple(defines(shape, plan).items())
    return loaded(target.source, macros, target.architecture, plan.shared_bytes, target.threads, device)


@lru_cache(maxsize=_REMEMBERED)
def _shared_table(
    shape: BlockShape, tiles: Tiles, adaptive: bool, device: torch.device
) -> tuple[Table, Shared]:
    """The table, and its words on the device."""
    table = build(shape, tiles, adaptive=adaptive)
    return table, Shared(table.encode().to(device))


class Buffers(NamedTuple):
    """Global memory of one call, in the order of the kernel's pointers."""

    input: Tensor
    output: Tensor
    stream_values: Tensor  # fp32 [2, B, L, D], or [S + 1, B, L, D] where the loops' inputs are kept
    qkv_values: Tensor  # bf16 [2, B, L, 3 D]
    mixed_values: Tensor  # bf16 [B, L, D]
    gelu_values: Tensor  # bf16 [B, L, F]
    rows_values: Tensor | None  # bf16 [B, L, D]
    partial_values: Tensor | None  # fp32 [parts, B, L, D]
    statistics1: Tensor  # fp32 [B, L, parts, 2]
    statistics2: Tensor
    change: Tensor  # fp32 [B, row tiles, tiles or their warps, 2]
    affine: Tensor  # fp32 [n, 1 or B, 2, D / 2, 4]
    gate: Tensor  # fp32 [n, 1 or B, 2, D]
    mlp_in_bias: Tensor
    mlp_out_bias: Tensor
    cosines: Tensor | None  # fp32 [L, K / 2]
    sines: Tensor | None
    key_mask: Tensor | None  # uint8 [B, L]
    counters: Tensor  # those of the table, progress of each sequence, and two more
    stop: Tensor  # int32: loops of each sequence, then the largest of them

    @classmethod
    def allocate(
        cls,
        table: Table,
        x: Tensor,
        weights: PackedWeights,
        modulation: Tensor,
        num_loops: int | Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
        *,
        keep: bool = False,
    ) -> Buffers:
        shape, tiles = table.shape, table.tiles
        batch, length, hidden = shape.batch, shape.length, shape.hidden
        groups = sides(tiles) * 128 // block_rows(tiles)  # of warps, which share the columns of a tile
        changes = groups * hidden // tiles.mlp_out * tiles.rows // 16
        if tiles.sum_rows:
            changes = tiles.rows // tiles.sum_rows * tiles.blocks

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=x.device)

        parts = hidden // STATISTICS_COLUMNS
        return cls(
            stream_values=empty(1 + most_loops(num_loops) if keep else 2, batch, length, hidden),
            qkv_values=empty(2, batch, length, 3 * hidden, dtype=torch.bfloat16),
            mixed_values=empty(batch, length, hidden, dtype=torch.bfloat16),
            gelu_values=empty(batch, length, shape.mlp, dtype=torch.bfloat16),
            rows_values=empty(batch, length, hidden, dtype=torch.bfloat16) if tiles.normalised else None,
            partial_values=empty(tiles.mlp_out_tiles, batch, length, hidden) if tiles.sum_rows else None,
            statistics1=empty(batch, length, parts, 2),
            statistics2=empty(batch, length, parts, 2),
            change=empty(batch, table.row_tiles, changes, 2),
            **of_call(x, weights, modulation, rotary, key_mask, table.num_counters),
        )


AllBuffers = Buffers | looped_rows.Buffers


def map_layouts(
    shape: BlockShape, plan: Plan, buffers: Buffers, weights: PackedWeights
) -> dict[str, tensor_maps.Layout]:
    """Tensors and boxes of the kernel's maps."""
    tiles, blocks = plan.tiles, plan.blocks
    # Of what is for two blocks each loads half: weights, keys and values, of four also rows.
    rows = block_rows(tiles) // sides(tiles)
    boxes = {
        "stream": (buffers.stream_values.flatten(0, 1), rows),
        "qkv": (buffers.qkv_values.flatten(0, 1), 64 if blocks > 1 else rows),
        "mixed": (buffers.mixed_values, rows),
        "gelu": (buffers.gelu_values, rows),
        "qkv_weight": (weights.qkv, tiles.qkv // blocks),
        "attn_out_weight": (weights.attn_out, tiles.attn_out // blocks),
        "mlp_in_weight": (weights.mlp_in, tiles.mlp_in // blocks),
        "mlp_out_weight": (weights.mlp_out, tiles.mlp_out // blocks),
    }
    if buffers.rows_values is not None:
        boxes["rows"] = (buffers.rows_values, rows)
    # A small head is a panel of its own.
    row_bytes = {"qkv": min(tensor_maps.SWIZZLE_BYTES, 2 * shape.head_dim)}
    return {
        name: tensor_maps.layout(*box, row_bytes.get(name, tensor_maps.SWIZZLE_BYTES))
        for name, box in boxes.items()
    }


def pack_parameters(
    target: Target,
    table: Table,
    buffers: Buffers,
    weights: PackedWeights,
    words: Tensor,
    exit_threshold: float | None,
) -> ctypes.Structure:
    """All but the maps."""
    shape = table.shape
    result = target.parameters(
        size=(len(table.enter), len(table.loop), len(table.leave)),
        batch=shape.batch,
        length=shape.length,
        row_tiles=table.row_tiles,
        num_counters=table.num_counters,
        modulated_sequences=buffers.gate.shape[1],
        adaptive=int(table.adaptive),
        keep=int(len(buffers.stream_values) > 2),
        exit_threshold=exit_threshold or 0.0,
    )
    addresses: dict[str, Tensor | None] = {
        **buffers._asdict(),
        **{f"{name}_weight": getattr(weights, name) for name in MATRICES},
        "table": words,
        "max_loops": buffers.stop[shape.batch :],
    }
    for name in fields(target.parameters, ctypes.c_void_p):
        setattr(result, name, address(addresses[name]))
    return result
