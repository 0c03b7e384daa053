"""What has to be right in memory before the kernel of a call begins: looped_blocks/prepare_call.cu."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.cuda import driver
from loopmdm_kernels.cuda.launch import loaded
from loopmdm_kernels.cuda.parameters import address, structure
from loopmdm_kernels.cuda.refresh import CHUNK, KINDS, readable
from loopmdm_kernels.cuda.targets import Target
from loopmdm_kernels.cuda.weights import PackedWeights
from loopmdm_kernels.schedule.table import FINAL
from loopmdm_kernels.types import Rotary

SOURCE = "looped_blocks/prepare_call.cu"
THREADS = 256
SHARED_BYTES = 8 * THREADS // 32
Arguments = structure(SOURCE, "PrepareArguments")


class Counted(NamedTuple):
    """Counters of a call; behind them are progress of each sequence, and two more."""

    batch: int
    number: int
    adaptive: bool  # sequences may stop after any loop


def of_call(
    x: Tensor,
    weights: PackedWeights,
    modulation: Tensor,
    rotary: Rotary | None,
    key_mask: Tensor | None,
    num_counters: int,
) -> dict[str, Any]:
    """What every forward kernel gets: its call's tensors as it reads them, and room for what is prepared."""
    (layers, sequences), (batch, _, hidden) = modulation.shape[:2], x.shape

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=x.device)

    return {
        "input": x.contiguous(),
        "output": empty(*x.shape),
        "affine": empty(layers, sequences, 2, hidden // 2, 4),
        "gate": empty(layers, sequences, 2, hidden),
        "mlp_in_bias": weights.mlp_in_bias,
        "mlp_out_bias": weights.mlp_out_bias,
        "cosines": None if rotary is None else rotary.cos.float().contiguous(),
        "sines": None if rotary is None else rotary.sin.float().contiguous(),
        "key_mask": None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        "counters": empty(num_counters + batch + 2, dtype=torch.int32),
        "stop": empty(batch + 1, dtype=torch.int32),
    }


def written(buffers: Any) -> dict[str, Tensor]:
    """Of either kernel's buffers what is written before it begins."""
    return {name: getattr(buffers, name) for name in ("affine", "gate", "counters", "stop")}


def most_loops(num_loops: int | Tensor) -> int:
    """A tensor is read by the host: memory cannot wait for it."""
    return int(num_loops.max()) if isinstance(num_loops, Tensor) else num_loops


def kernel_on(target: Target, device: int) -> driver.Kernel:
    return loaded(SOURCE, (), target.architecture, SHARED_BYTES, THREADS, device)


def modulation_for_kernel(modulation: Tensor) -> Tensor:
    """The same numbers [n, 1 or B, 6, D] as the kernel can read them."""
    layer, sequence, vector, _ = modulation.stride()
    in_pairs = vector == modulation.shape[3] and layer % 2 == 0 and sequence % 2 == 0
    return modulation if in_pairs and readable(modulation) else _copied(modulation)


def _copied(modulation: Tensor) -> Tensor:
    return modulation.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def arguments_of(
    counted: Counted,
    weights: PackedWeights,
    modulation: Tensor,
    num_loops: int | Tensor,
    *,
    affine: Tensor,
    gate: Tensor,
    counters: Tensor,
    stop: Tensor,
) -> ctypes.Structure:
    """`modulation` is what `modulation_for_kernel` gives; the rest are tensors that the kernel writes."""
    layers, sequences, _, hidden = modulation.shape
    own = num_loops.expand(counted.batch) if isinstance(num_loops, Tensor) else None
    chunks, fingerprints = weights.refresh or (None, None)
    return Arguments(
        chunks=address(chunks),
        fingerprints=address(fingerprints),
        norms=address(weights.norms),
        modulation=address(modulation),
        num_loops=address(own),
        affine=address(affine),
        gate=address(gate),
        counters=address(counters),
        stop=address(stop),
        layer_stride=modulation.stride(0),
        sequence_stride=modulation.stride(1),
        loops_stride=0 if own is None else own.stride(0),
        num_chunks=0 if chunks is None else len(chunks),
        norm_chunks=-(-hidden // CHUNK),
        modulation_kind=KINDS[modulation.dtype],
        layers=layers,
        sequences=sequences,
        hidden=hidden,
        batch=counted.batch,
        num_counters=counted.number,
        progress=0 if counted.adaptive else FINAL,
        loops=0 if isinstance(num_loops, Tensor) else int(num_loops),
    )


def blocks_of(arguments: ctypes.Structure) -> int:
    """One for each chunk, and threads enough for all pairs of columns and all counters."""
    pairs = arguments.layers * arguments.sequences * arguments.hidden
    counters = arguments.num_counters + arguments.batch + 2
    return int(arguments.num_chunks) - int(-max(pairs, counters) // THREADS)
