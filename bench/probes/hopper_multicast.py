"""Bytes a second that reach the SMs from L2 when blocks of a cluster load the same rows: alone, or for all.

A phase of bench.gpu_hopper. It decides whether the kernel's ring should load by multicast, see
docs/kernels/looped_blocks.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from bench.probes.hopper_facts import READS, WEIGHT_BYTES, Run, rate
from bench.run import Figures
from loopmdm_kernels.cuda import tensor_maps

ROWS, ROW_BYTES = 128, 128  # of a stage, as in hopper_multicast.cu
RING_BYTES = 8 * ROWS * ROW_BYTES + 1024
THREADS = 64
SIZES = {"alone": 1, "pairs": 2, "fours": 4}


class SharedReads(ctypes.Structure):
    _fields_ = (
        ("map", ctypes.c_uint8 * 128),
        ("stages", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("unused", ctypes.c_uint8 * 56),  # the map's alignment is 64
    )


def multicast(run: Run) -> Figures:
    kernel = run.probe("read_together", "hopper_multicast.cu", shared_bytes=RING_BYTES)
    buffer = torch.zeros(
        1, WEIGHT_BYTES // ROW_BYTES, ROW_BYTES // 2, dtype=torch.bfloat16, device=run.device
    )
    blocks = {name: size * (kernel.active_clusters(size, THREADS) or 1) for name, size in SIZES.items()}

    def reading(name: str, size: int) -> Callable[[], Any]:
        arguments = SharedReads(stages=buffer.shape[1] // ROWS, rounds=READS)
        described = tensor_maps.layout(buffer, ROWS // size)
        if not run.dry:
            arguments.map[:] = tensor_maps.encode(described)
        return lambda: kernel.launch(blocks[name], THREADS, run.stream, arguments, cluster=size)

    times = run.seconds({name: reading(name, size) for name, size in SIZES.items()})
    return {name: rate(READS * blocks[name] * WEIGHT_BYTES, seconds) for name, seconds in times.items()}
