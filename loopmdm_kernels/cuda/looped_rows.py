"""`looped_blocks` of narrow blocks and short sequences: by one launch of looped_rows_sm90.cu."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.cuda import driver, tensor_maps
from loopmdm_kernels.cuda.launch import Kernel, known_device, loaded
from loopmdm_kernels.cuda.parameters import address, fields, structure
from loopmdm_kernels.cuda.prepare import Counted, most_loops, of_call
from loopmdm_kernels.cuda.targets import SM90, Target
from loopmdm_kernels.cuda.weights import MATRICES, PackedWeights
from loopmdm_kernels.schedule import BlockShape, Device, RowsPlan, choose_rows
from loopmdm_kernels.schedule.rows import ROWS
from loopmdm_kernels.types import Rotary

SOURCE = "looped_blocks/looped_rows_sm90.cu"
Parameters = structure(SOURCE, "KernelParameters")


class Found(NamedTuple):
    kernel: driver.Kernel
    plan: RowsPlan
    clusters: int  # that the device holds at the same time


def plan_of(shape: BlockShape, target: Target, device: Device) -> RowsPlan | None:
    """None where the kernel that works by tiles is to do it."""
    return choose_rows(shape, device) if target.entry == SM90.entry else None


def kernel_of(shape: BlockShape, plan: RowsPlan) -> Kernel:
    macros = tuple(defines(shape, plan).items())
    return Kernel(SOURCE, plan.threads, plan.shared_bytes, macros, plan.blocks)


@lru_cache(maxsize=128)
def kernel_on(shape: BlockShape, target: Target, device: int) -> Found | None:
    """The kernel of this shape, or None where the one that works by tiles is to do it.

    Raises:
        Breach: its code is not what it is written to be.
    """
    known = known_device(driver.facts(device))
    plan = plan_of(shape, target, known)
    if plan is None:
        return None
    source, threads, shared_bytes, macros, cluster = kernel_of(shape, plan)
    kernel = loaded(source, macros, target.architecture, shared_bytes, threads, device, cluster)
    clusters = kernel.active_clusters(cluster, threads)
    # No part of this GPU may have so many SMs, or fewer parts than the plan took for granted.
    if not clusters or choose_rows(shape, known, clusters) is None:
        return None
    return Found(kernel, plan, clusters)


def defines(shape: BlockShape, plan: RowsPlan) -> dict[str, int]:
    """The macros of `Widths` and rows_config_sm90.cuh."""
    values = {
        "HIDDEN": shape.hidden,
        "HEADS": shape.heads,
        "MLP": shape.mlp,
        "LAYERS": shape.layers,
        "MLP_OUT_PARTS": plan.mlp_out_parts,
        "BLOCKS": plan.blocks,
        "STAGES": plan.stages,
        "BESIDE_BYTES": plan.beside_bytes,
    }
    return {f"LOOPMDM_{name}": value for name, value in values.items()}


class Buffers(NamedTuple):
    """Global memory of one call, in the order of the kernel's pointers."""

    input: Tensor
    output: Tensor
    stream_values: Tensor | None  # fp32 [S + 1, B, L, D], where the loops' inputs are kept
    qkv_values: Tensor  # bf16 [B, L, 2 D]: keys and values
    change: Tensor  # fp32 [B, blocks, 2]
    affine: Tensor  # fp32 [n, 1 or B, 2, D / 2, 4]
    gate: Tensor  # fp32 [n, 1 or B, 2, D]
    mlp_in_bias: Tensor
    mlp_out_bias: Tensor
    cosines: Tensor | None  # fp32 [L, K / 2]
    sines: Tensor | None
    key_mask: Tensor | None  # uint8 [B, L]
    counters: Tensor  # of each sequence, and what `prepare_call` sets besides
    stop: Tensor  # int32: loops of each sequence, then the largest of them

    @classmethod
    def allocate(
        cls,
        plan: RowsPlan,
        x: Tensor,
        weights: PackedWeights,
        modulation: Tensor,
        num_loops: int | Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
        *,
        keep: bool = False,
    ) -> Buffers:
        batch, length, hidden = x.shape

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=x.device)

        return cls(
            stream_values=empty(1 + most_loops(num_loops), batch, length, hidden) if keep else None,
            qkv_values=empty(batch, length, 2 * hidden, dtype=torch.bfloat16),
            change=empty(batch, plan.blocks, 2),
            **of_call(x, weights, modulation, rotary, key_mask, batch),  # a counter a sequence
        )


def counters_of(batch: int, *, adaptive: bool) -> Counted:
    """Of the squared changes of each sequence."""
    return Counted(batch, batch, adaptive)


def map_layouts(plan: RowsPlan, buffers: Buffers, weights: PackedWeights) -> dict[str, tensor_maps.Layout]:
    """Tensors and boxes of the kernel's maps."""
    boxes = {f"{name}_weight": (getattr(weights, name), plan.features) for name in MATRICES}
    boxes["qkv"] = buffers.qkv_values, ROWS
    return {name: tensor_maps.layout(*box) for name, box in boxes.items()}


def pack_parameters(buffers: Buffers, exit_threshold: float | None) -> ctypes.Structure:
    """All but the maps."""
    batch, length, _ = buffers.input.shape
    result: ctypes.Structure = Parameters(
        batch=batch,
        length=length,
        modulated_sequences=buffers.gate.shape[1],
        adaptive=int(exit_threshold is not None),
        exit_threshold=exit_threshold or 0.0,
    )
    for name in fields(Parameters, ctypes.c_void_p):
        setattr(result, name, address(getattr(buffers, name)))
    return result
