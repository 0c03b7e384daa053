"""Packed weights follow parameters that were written to unnoticed: looped_blocks/refresh_weights.cu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.cuda import driver
from loopmdm_kernels.cuda.launch import loaded
from loopmdm_kernels.cuda.parameters import structure
from loopmdm_kernels.cuda.targets import Target, target_of

SOURCE = "looped_blocks/refresh_weights.cu"
THREADS = 256
SHARED_BYTES = 8 * THREADS // 32
CHUNK = 16384  # elements: 64 KB of fp32, of which a block reads 8 to compare
DTYPES = (torch.float32, torch.bfloat16)
Arguments = structure(SOURCE, "RefreshArguments")


def kernel_on(target: Target, device: int) -> driver.Kernel:
    return loaded(SOURCE, (), target.architecture, SHARED_BYTES, THREADS, device)


class Refresh(NamedTuple):
    """What is packed where, for one device."""

    chunks: Tensor  # int64 [chunks, 4], `Chunk` of the kernel
    fingerprints: Tensor  # int64 [chunks]; 0 is like no parameter, so the first time all is converted

    def launch(self) -> None:
        """On the current stream, before the kernel that reads the weights."""
        device = self.chunks.device
        with torch.cuda.device(device):
            arguments = Arguments(self.chunks.data_ptr(), self.fingerprints.data_ptr())
            stream = torch.cuda.current_stream(device).cuda_stream
            target = target_of(torch.cuda.get_device_capability(device))
            kernel = kernel_on(target, device.index)
            kernel.launch_in_order(len(self.chunks), THREADS, stream, arguments, early=False)


def refresh_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> Refresh | None:
    """For pairs of a parameter and its packed copy; None if the kernel cannot read one of the parameters."""
    rows = []
    for source, target in pairs:
        if source.dtype not in DTYPES or not source.is_contiguous() or source.numel() % 2:
            return None
        kinds = source.element_size() | target.element_size() << 32
        for first in range(0, source.numel(), CHUNK):
            rows.append(
                (
                    source.data_ptr() + first * source.element_size(),
                    target.data_ptr() + first * target.element_size(),
                    min(CHUNK, source.numel() - first),
                    kinds,
                )
            )
        device = target.device
    return Refresh(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.zeros(len(rows), dtype=torch.int64, device=device),
    )
