"""Gradients of `looped_blocks` on Hopper: all loops and layers in one cooperative launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.cuda import driver, tensor_maps
from loopmdm_kernels.cuda.compiler import compile_kernel, limited
from loopmdm_kernels.cuda.launch import keep_for_graphs, set_map
from loopmdm_kernels.cuda.parameters import MAP, address, backward_defines, fields, structure
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
    device_of,
    finish,
    measured,
)
from loopmdm_kernels.types import BlockWeights

SOURCE, ENTRY = "looped_blocks/looped_blocks_backward_sm90.cu", "looped_blocks_backward_sm90"
CAPABILITY = (9, 0)  # of the GPUs that have it
HEAD_DIMS = (64, 128)
_BOX = 64  # rows of every map
_BIAS_PARTS = 8  # of a row tile: the warps that compute


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
        kernel, plan = _kernel(kept.shape, device)
        table, words, counters = _table(kept.shape, plan.tiles, grad.device)
        keep_for_graphs(words, counters)
        buffers = BackwardBuffers.allocate(table, kept, grad, counters)
        parameters = pack_parameters(table, buffers, words)
        for name, described in map_layouts(buffers, kept.weights).items():
            set_map(parameters, name, described)
        limits = driver.facts(device)
        driver.set_aside_l2(device)
        window = driver.l2_window(kept.weights.buffer.data_ptr(), 2 * kept.weights.buffer.numel(), limits)
        stream = torch.cuda.current_stream(grad.device).cuda_stream
        kernel.launch(
            limits.sms * kernel.blocks_per_sm(SM90.threads), SM90.threads, stream, parameters, window
        )
    return buffers.grad, *finish(buffers.row_sums(), buffers.weight_sums(), blocks, modulation)


@lru_cache(maxsize=64)
def _kernel(shape: BlockShape, device: int) -> tuple[driver.Kernel, BackwardPlan]:
    limits = driver.facts(device)
    known = device_of(
        limits.capability, limits.sms, limits.shared_bytes, name=limits.name, measured=measured.table()
    )
    plan = choose_backward(shape, known)
    macros = tuple(limited(backward_defines(shape, plan)).items())
    return _loaded(macros, plan.shared_bytes, device), plan


@lru_cache(maxsize=64)
def _loaded(macros: tuple[tuple[str, int], ...], shared_bytes: int, device: int) -> driver.Kernel:
    return driver.Kernel(compile_kernel(SOURCE, dict(macros), SM90.architecture), ENTRY, shared_bytes)


@lru_cache(maxsize=64)
def _table(shape: BlockShape, tiles: BackwardTiles, device: torch.device) -> tuple[Table, Tensor, Tensor]:
    """The table, its words and the first state of its counters on the device."""
    table = build_backward(shape, tiles)
    counters = torch.tensor(table.initial_counters(), dtype=torch.int32)
    return table, table.encode().to(device), counters.to(device)


class BackwardBuffers(NamedTuple):
    """Global memory of one call, in the order of the kernel's pointers."""

    loop_inputs: Tensor
    grad: Tensor
    middle: Tensor  # fp32 [n, B, L, D]
    state: Tensor
    log_sum_exp: Tensor  # fp32 [n, B, H, rows of all tiles]
    rows1_values: Tensor  # bf16 [n, B, L, D], as all to `grad_qkv_values` but `grad_rows` and `inner`
    qkv_values: Tensor  # 3 D wide
    mixed_values: Tensor
    branch1_values: Tensor
    rows2_values: Tensor
    mlp_in_values: Tensor  # F wide
    gelu_values: Tensor  # F wide
    branch2_values: Tensor
    grad_rows: Tensor  # fp32 [B, L, D]
    inner: Tensor  # like log_sum_exp
    grad_branch2_values: Tensor
    grad_mlp_in_values: Tensor  # F wide
    grad_branch1_values: Tensor
    grad_mixed_values: Tensor
    grad_qkv_values: Tensor  # 3 D wide
    norms: Tensor  # the sums, fp32; see RowSums and WeightSums
    gates: Tensor
    grad_branch: Tensor
    grad_mlp_in_bias: Tensor
    grad_qkv_weight: Tensor
    grad_attn_out_weight: Tensor
    grad_mlp_in_weight: Tensor
    grad_mlp_out_weight: Tensor
    affine: Tensor
    gate: Tensor
    mlp_in_bias: Tensor
    mlp_out_bias: Tensor
    cosines: Tensor | None
    sines: Tensor | None
    key_mask: Tensor | None
    counters: Tensor
    stop: Tensor

    @classmethod
    def allocate(cls, table: Table, kept: Kept, grad: Tensor, counters: Tensor) -> BackwardBuffers:
        shape = table.shape
        layers, batch, length, hidden, mlp = (
            shape.layers, shape.batch, shape.length, shape.hidden, shape.mlp,
        )  # fmt: skip
        rows = table.row_tiles * table.tiles.rows
        parts = rows // table.tiles.part

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=grad.device)

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, device=grad.device, dtype=torch.float32)

        def record(width: int) -> Tensor:
            return empty(layers, batch, length, width, dtype=torch.bfloat16)

        widths = {name: mlp for name in ("mlp_in_values", "gelu_values", "grad_mlp_in_values")}
        widths |= {name: 3 * hidden for name in ("qkv_values", "grad_qkv_values")}
        records = {name: record(widths.get(name, hidden)) for name in cls._fields if name.endswith("_values")}
        return cls(
            loop_inputs=kept.loop_inputs,
            grad=grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
            middle=empty(layers, batch, length, hidden),
            state=empty(layers, batch, length, hidden),
            log_sum_exp=empty(layers, batch, shape.heads, rows),
            grad_rows=empty(batch, length, hidden),
            inner=empty(layers, batch, shape.heads, rows),
            norms=zeros(layers, 2, 2, batch, parts, hidden),
            gates=zeros(layers, 2, batch, parts, hidden),
            grad_branch=zeros(layers, batch, parts, hidden),
            grad_mlp_in_bias=zeros(layers, batch, table.row_tiles * _BIAS_PARTS, mlp),
            affine=kept.affine,
            gate=kept.gate,
            mlp_in_bias=kept.weights.mlp_in_bias,
            mlp_out_bias=kept.weights.mlp_out_bias,
            cosines=kept.cosines,
            sines=kept.sines,
            key_mask=kept.key_mask,
            counters=counters.clone(),
            stop=kept.stop,
            **records,
            **{f"grad_{name}_weight": zeros(*getattr(kept.weights, name).shape) for name in MATRICES},
        )

    def row_sums(self) -> RowSums:
        return RowSums(self.norms, self.gates, self.grad_branch, self.grad_mlp_in_bias)

    def weight_sums(self) -> WeightSums:
        return WeightSums(*(getattr(self, f"grad_{name}_weight") for name in WeightSums._fields))


def map_layouts(buffers: BackwardBuffers, weights: PackedWeights) -> dict[str, tensor_maps.Layout]:
    """Tensors of the kernel's maps; all boxes are 64 by 64."""

    def tensor(name: str) -> Tensor:
        if name.endswith("_weight"):
            found: Tensor = getattr(weights, name.removesuffix("_weight"))
            return found
        values: Tensor = getattr(buffers, f"{name}_values")
        return values.flatten(0, 1)

    return {name: tensor_maps.layout(tensor(name), _BOX) for name in fields(parameters_of_kernel(), MAP)}


def parameters_of_kernel() -> type[ctypes.Structure]:
    return structure("looped_blocks/backward_config_sm90.cuh", "Parameters")


def pack_parameters(table: Table, buffers: BackwardBuffers, words: Tensor) -> ctypes.Structure:
    """All but the maps."""
    shape = table.shape
    result = parameters_of_kernel()(
        instructions=len(table.loop),
        batch=shape.batch,
        length=shape.length,
        row_tiles=table.row_tiles,
        modulated_sequences=buffers.gate.shape[1],
    )
    addresses: dict[str, Tensor | None] = {
        **buffers._asdict(),
        "table": words,
        "max_loops": buffers.stop[shape.batch :],
    }
    for name in fields(parameters_of_kernel(), ctypes.c_void_p):
        setattr(result, name, address(addresses[name]))
    return result
