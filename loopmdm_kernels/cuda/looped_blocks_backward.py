"""Gradients of `looped_blocks` on Hopper: all loops and layers in one cooperative launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.cuda import driver, tensor_maps
from loopmdm_kernels.cuda.launch import keep_for_graphs, known_device, loaded, set_map
from loopmdm_kernels.cuda.parameters import MAP, address, backward_defines, fields, structure
from loopmdm_kernels.cuda.streams import Shared
from loopmdm_kernels.cuda.targets import SM90
from loopmdm_kernels.cuda.weights import MATRICES, PackedWeights
from loopmdm_kernels.schedule import (
    BackwardPlan,
    BackwardTiles,
    BlockShape,
    RowSums,
    Table,
    WeightSums,
    build_backward,
    choose_backward,
    finish,
)
from loopmdm_kernels.types import BlockWeights

SOURCE = "looped_blocks/looped_blocks_backward_sm90.cu"
CAPABILITY = (9, 0)  # of the GPUs that have it
HEAD_DIMS = (64, 128)
_BOX = 64  # rows of every map


class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    loop_inputs: Tensor  # fp32 [S or more, B, L, D]
    stop: Tensor  # int32: loops of each sequence, then the largest of them
    affine: Tensor
    gate: Tensor
    cosines: Tensor | None
    sines: Tensor | None
    key_mask: Tensor | None
    weights: PackedWeights
    heads: int

    @property
    def shape(self) -> BlockShape:
        _, batch, length, hidden = self.loop_inputs.shape
        layers, mlp, _ = self.weights.mlp_in.shape
        return BlockShape(batch, length, hidden, self.heads, mlp, layers)


def gradients(
    kept: Kept, grad: Tensor, blocks: Sequence[BlockWeights], modulation: Tensor
) -> tuple[Tensor, list[BlockWeights], Tensor]:
    """Gradients of x, the blocks and the modulation from that of the result [B, L, D]."""
    device = grad.device.index
    with torch.cuda.device(grad.device):
        kernel, plan = kernel_on(kept.shape, device)
        table, shared = _shared_table(kept.shape, plan.tiles, grad.device)
        words, counters = shared.read()
        keep_for_graphs(words, counters)
        buffers = allocate(table, kept, grad, counters)
        parameters = pack_parameters(table, buffers, words)
        for name, described in map_layouts(buffers, kept.weights).items():
            set_map(parameters, name, described)
        limits = driver.facts(device)
        driver.set_aside_l2(device)
        window = driver.l2_window(kept.weights.buffer.data_ptr(), 2 * kept.weights.buffer.numel(), limits)
        stream = torch.cuda.current_stream(grad.device).cuda_stream
        if plan.blocks > 1:
            grid = plan.blocks * kernel.active_clusters(plan.blocks, SM90.threads)
        else:
            grid = limits.sms * kernel.blocks_per_sm(SM90.threads)
        kernel.launch(grid, SM90.threads, stream, parameters, window, cluster=plan.blocks)
    return buffers["grad"], *finish(*sums_of(buffers), blocks, modulation)


@lru_cache(maxsize=64)
def kernel_on(shape: BlockShape, device: int) -> tuple[driver.Kernel, BackwardPlan]:
    known = known_device(driver.facts(device))
    plan = choose_backward(shape, known)
    kernel = _loaded(shape, plan, device)
    if plan.blocks > 1 and not kernel.active_clusters(plan.blocks, SM90.threads):
        plan = choose_backward(shape, known._replace(cluster=1))  # no part of this GPU has two SMs
        kernel = _loaded(shape, plan, device)
    return kernel, plan


def _loaded(shape: BlockShape, plan: BackwardPlan, device: int) -> driver.Kernel:
    macros = tuple(backward_defines(shape, plan).items())
    return loaded(SOURCE, macros, SM90.architecture, plan.shared_bytes, SM90.threads, device)


@lru_cache(maxsize=64)
def _shared_table(shape: BlockShape, tiles: BackwardTiles, device: torch.device) -> tuple[Table, Shared]:
    table, words, counters = _table(shape, tiles, device)
    return table, Shared(words, counters)


def _table(shape: BlockShape, tiles: BackwardTiles, device: torch.device) -> tuple[Table, Tensor, Tensor]:
    """The table, its words and the first state of its counters on the device."""
    table = build_backward(shape, tiles)
    counters = tiles.blocks * torch.tensor(table.initial_counters(), dtype=torch.int32)
    return table, table.encode().to(device), counters.to(device)


def allocate(table: Table, kept: Kept, grad: Tensor, counters: Tensor) -> dict[str, Any]:
    """Global memory of one call, by the names that the kernel's parameters have."""
    layers, batch, length = table.shape.layers, table.shape.batch, table.shape.length
    hidden, mlp = table.shape.hidden, table.shape.mlp
    rows = table.row_tiles * table.tiles.rows
    parts = table.tiles.blocks * rows // table.tiles.part

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=grad.device)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, device=grad.device, dtype=torch.float32)

    widths = {"mlp_in": mlp, "gelu": mlp, "grad_mlp_in": mlp, "qkv": 3 * hidden, "grad_qkv": 3 * hidden}
    records = [name for name in fields(parameters_of_kernel(), ctypes.c_void_p) if name.endswith("_values")]
    return {
        "loop_inputs": kept.loop_inputs,
        "grad": grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
        "middle": empty(layers, batch, length, hidden),
        "state": empty(layers, batch, length, hidden),
        "log_sum_exp": empty(layers, batch, table.shape.heads, rows),
        "grad_rows": empty(batch, length, hidden),
        "inner": empty(layers, batch, table.shape.heads, rows),
        **{
            name: empty(
                layers, batch, length, widths.get(name.removesuffix("_values"), hidden), dtype=torch.bfloat16
            )
            for name in records
        },
        "norms": zeros(layers, 2, 2, batch, parts, hidden),
        "gates": zeros(layers, 2, batch, parts, hidden),
        "grad_branch": zeros(layers, batch, parts, hidden),
        "grad_mlp_in_bias": zeros(layers, batch, parts, mlp),
        **{f"grad_{name}_weight": zeros(*getattr(kept.weights, name).shape) for name in MATRICES},
        **{name: getattr(kept, name) for name in ("affine", "gate", "cosines", "sines", "key_mask", "stop")},
        "mlp_in_bias": kept.weights.mlp_in_bias,
        "mlp_out_bias": kept.weights.mlp_out_bias,
        "counters": counters.clone(),
    }


def sums_of(buffers: dict[str, Any]) -> tuple[RowSums, WeightSums]:
    return (
        RowSums(*(buffers[name] for name in RowSums._fields)),
        WeightSums(*(buffers[f"grad_{name}_weight"] for name in WeightSums._fields)),
    )


def map_layouts(buffers: dict[str, Any], weights: PackedWeights) -> dict[str, tensor_maps.Layout]:
    """Tensors of the kernel's maps; all boxes are 64 by 64."""

    def tensor(name: str) -> Tensor:
        if name.endswith("_weight"):
            found: Tensor = getattr(weights, name.removesuffix("_weight"))
            return found
        values: Tensor = buffers[f"{name}_values"]
        return values.flatten(0, 1)

    return {name: tensor_maps.layout(tensor(name), _BOX) for name in fields(parameters_of_kernel(), MAP)}


def parameters_of_kernel() -> type[ctypes.Structure]:
    return structure("looped_blocks/backward_config_sm90.cuh", "Parameters")


def pack_parameters(table: Table, buffers: dict[str, Any], words: Tensor) -> ctypes.Structure:
    """All but the maps."""
    shape = table.shape
    result = parameters_of_kernel()(
        instructions=len(table.loop),
        batch=shape.batch,
        length=shape.length,
        row_tiles=table.row_tiles,
        modulated_sequences=buffers["gate"].shape[1],
    )
    addresses: dict[str, Tensor | None] = {
        **buffers,
        "table": words,
        "max_loops": buffers["stop"][shape.batch :],
    }
    for name in fields(parameters_of_kernel(), ctypes.c_void_p):
        setattr(result, name, address(addresses[name]))
    return result
