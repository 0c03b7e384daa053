"""Kernels by name: compiled for their macros, loaded once a device, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loopmdm_kernels.cuda import driver, tensor_maps
from loopmdm_kernels.cuda.compiler import compile_kernel, limited
from loopmdm_kernels.graphs import kept
from loopmdm_kernels.schedule import Device, device_of, measured

ARCHITECTURE = "sm_90a"  # of the kernels launched here
PORTABLE_CLUSTER = 8  # blocks; larger ones must be asked for
# What graphs read, by the number of their capture.
_held: dict[int, tuple[driver.CapturedGraph, list[Any]]] = {}
_lock = threading.Lock()


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
    device: int,
    cluster: int = 1,
) -> driver.Kernel:
    """For the context of `device`, which must be the current one, and clusters of up to `cluster` blocks."""
    cubin = compile_kernel(source, dict(macros), architecture)
    kernel = driver.Kernel(cubin, Path(source).stem, shared_bytes)
    if cluster > PORTABLE_CLUSTER:
        kernel.allow_large_clusters()
    return kernel


def launch(kernel: Kernel, parameters: ctypes.Structure, blocks: int, device: torch.device) -> None:
    """Nothing waits for the kernel but what comes later on the stream."""
    if blocks == 0:
        return
    macros = tuple(limited(dict(kernel.macros)).items())
    with torch.cuda.device(device):
        function = loaded(kernel.source, macros, ARCHITECTURE, kernel.shared_bytes, device.index)
        stream = torch.cuda.current_stream(device).cuda_stream
        function.launch_in_order(
            blocks, kernel.threads, stream, parameters, early=False, cluster=kernel.cluster
        )


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


def multiprocessors(device: torch.device) -> int:
    return driver.facts(device.index).sms
