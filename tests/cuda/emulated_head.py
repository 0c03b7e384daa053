"""Ops of the vocabulary head on emulated kernels: the host code as it is, a CPU in place of the driver."""

import contextlib
import ctypes
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loopmdm_kernels import backends
from loopmdm_kernels.cuda import driver, launch, tensor_maps
from loopmdm_kernels.testing.graphs import on_device
from tests.cuda.emulated import ALIGNMENT, compile_source, encode, fault

MACROS = {"LOOPMDM_ROWS": (64, 128), "LOOPMDM_OF_WEIGHT": (0, 1)}  # of the two variants that are built


@cache
def library(variant, folder):
    """All kernels, with 64 rows a tile and the product of the rows, or 128 and that of the weight."""
    target = Path(folder) / str(variant)
    target.mkdir()
    macros = {name: values[variant] for name, values in MACROS.items()}
    return compile_source("head_kernels", macros, target, optimize=False)


class Kernel:
    def __init__(self, library, name, state):
        self.library, self.name, self.state = library, name, state

    def launch_in_order(self, blocks, threads, stream, parameters, *, early, cluster):
        assert not early and blocks % cluster == 0
        self.state.launches.append((self.name, blocks))
        memory = ctypes.create_string_buffer(2048)  # as they are now, also for what runs later
        offset = -ctypes.addressof(memory) % ALIGNMENT
        ctypes.memmove(
            ctypes.addressof(memory) + offset, ctypes.addressof(parameters), ctypes.sizeof(parameters)
        )

        def run():
            address = ctypes.c_void_p(ctypes.addressof(memory) + offset)
            self.library.plant(self.state.fault)
            finished = getattr(self.library, f"run_{self.name}")(address, blocks, threads, self.state.seed)
            assert finished, fault(self.library)

        on_device(run)


@contextlib.contextmanager
def emulation(folder, *, multiprocessors=6):
    """Inside, kernels of `cuda.launch` run on the CPU; yields what tests may look at or set."""
    state = SimpleNamespace(launches=[], seed=0, multiprocessors=multiprocessors, fault=-1)
    state.plant = lambda number: setattr(state, "fault", number)

    def loaded(source, macros, architecture, shared_bytes, threads, device):
        name = Path(source).stem
        variant = next((MACROS[key].index(value) for key, value in macros), 0)
        return Kernel(library(variant, str(folder)), name, state)

    def facts(device):
        return SimpleNamespace(sms=state.multiprocessors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "why_unavailable", lambda capability: None)
        patch.setitem(backends._DEVICE_OF, "cuda", "cpu")
        patch.setattr(launch, "loaded", loaded)
        patch.setattr(driver, "facts", facts)
        patch.setattr(tensor_maps, "encode", encode)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        yield state
