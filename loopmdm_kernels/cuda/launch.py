"""Kernels by name: compiled for their macros, loaded once a device, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loopmdm_kernels.cuda import driver, tensor_maps
from loopmdm_kernels.cuda.compiler import compile_kernel
from loopmdm_kernels.graphs import kept
from loopmdm_kernels.schedule import Device, device_of, measured

ARCHITECTURE = "sm_90a"  # of the kernels launched here
PORTABLE_CLUSTER = 8  # blocks; larger ones must be asked for
# What graphs read, by the number of their capture.
_held: dict[int, tuple[driver.CapturedGraph, list[Any]]] = {}
_lock = threading.Lock()


class Breach(RuntimeError):
    """A kernel's code is not what it is written to be: another backend has to do the call."""


class Kernel(NamedTuple):
    """A file of csrc/cuda, whose kernel has its name, and what it is compiled and launched with."""

    source: str
    threads: int
    shared_bytes: int = 0
    macros: tuple[tuple[str, int], ...] = ()
    cluster: int = 1  # blocks that share memory


def known_device(limits: driver.Facts) -> Device:
    """A GPU for the cost model, with its measured ceilings if there are any."""
    return device_of(
        limits.capability, limits.sms, limits.shared_bytes, name=limits.name, measured=measured.table()
    )


@lru_cache(maxsize=64)
def loaded(
    source: str,
    macros: tuple[tuple[str, int], ...],
    architecture: str,
    shared_bytes: int,
    threads: int,
    device: int,
    cluster: int = 1,
) -> driver.Kernel:
    """For the context of `device`, which must be the current one, and clusters of up to `cluster` blocks.

    Raises:
        Breach: its code is not what it is written to be.
        RuntimeError: it does not compile or cannot be loaded.
    """
    cubin = compile_kernel(source, dict(macros), architecture)
    kernel = driver.Kernel(cubin, Path(source).stem, shared_bytes, device)
    reason = kernel.breach(threads)
    if reason is not None:
        raise Breach(reason)
    if cluster > PORTABLE_CLUSTER:
        kernel.allow_large_clusters()
    return kernel


def launch(kernel: Kernel, parameters: ctypes.Structure, blocks: int, device: torch.device) -> None:
    """Nothing waits for the kernel but what comes later on the stream."""
    if blocks == 0:
        return
    with torch.cuda.device(device):
        function = _function(kernel, device)
        stream = torch.cuda.current_stream(device).cuda_stream
        function.launch_in_order(
            blocks, kernel.threads, stream, parameters, early=False, cluster=kernel.cluster
        )


def why_refused(kernels: Iterable[Kernel], device: torch.device) -> str | None:
    """Why one of these cannot be used there, or None."""
    with torch.cuda.device(device):
        return next(filter(None, (_why_refused(kernel, device) for kernel in kernels)), None)


@lru_cache(maxsize=64)
def _why_refused(kernel: Kernel, device: torch.device) -> str | None:
    try:
        _function(kernel, device)
    except Breach as error:
        return str(error)
    return None


def _function(kernel: Kernel, device: torch.device) -> driver.Kernel:
    return loaded(
        kernel.source, kernel.macros, ARCHITECTURE, kernel.shared_bytes, kernel.threads, device.index
    )


def persistent_blocks(kernel: Kernel, tiles: int, device: torch.device) -> int:
    """Of a kernel that goes through tiles, each of one cluster: as many as there are tiles or room.

    Raises:
        RuntimeError: there is room for none.
    """
    clusters = driver.facts(device.index).sms // kernel.cluster
    if not clusters:
        raise RuntimeError(f"{kernel.source}: needs {kernel.cluster} multiprocessors, got 1 (MIG or MPS)")
    return kernel.cluster * min(tiles, clusters)


def keep_for_graphs(*read: Any) -> None:
    """A graph that is captured on the current stream reads this at every replay: it lives as long."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    owner = kept()
    if owner is not None:  # a graph of `CudaGraphs`
        owner.append(read)
        return
    drop_ended_graphs()
    number, graph = driver.capture_of(torch.cuda.current_stream().cuda_stream)
    with _lock:
        if number not in _held:
            _held[number] = driver.CapturedGraph(graph), []
        _held[number][1].append(read)


def drop_ended_graphs() -> None:
    """Let go of what is kept for graphs that are gone: at the next capture or packing of weights."""
    with _lock:
        for number in [number for number, (graph, _) in _held.items() if graph.ended()]:
            del _held[number]


def set_map(parameters: ctypes.Structure, name: str, layout: tensor_maps.Layout) -> None:
    getattr(parameters, name)[:] = tensor_maps.encode(layout)
