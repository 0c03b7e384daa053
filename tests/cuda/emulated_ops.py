"""Every op that a sampler calls on emulated kernels: the host code as it is, a CPU in place of the driver."""

import ctypes
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from loopmdm_kernels.cuda import driver, looped_rows, prepare
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda.parameters import defines
from loopmdm_kernels.schedule import Tiles, plan
from loopmdm_kernels.testing.graphs import on_device
from tests.cuda import emulated, emulated_head

TILES = Tiles(64, 64, 64, 64, 64, 2)  # of any shape: one kernel is compiled for a model


class Kernel:
    """Stands in for the driver's."""

    def __init__(self, library, name, state):
        self.library, self.name, self.state = library, name, state

    def blocks_per_sm(self, threads):
        return 1

    def active_clusters(self, size, threads):
        return self.state.multiprocessors // size

    def launch_in_order(self, blocks, threads, stream, parameters, *, early):
        assert not early
        self.launch(blocks, threads, stream, parameters)

    def launch(self, blocks, threads, stream, parameters, kept=None, *, cluster=1, cooperative=True):
        self.state.launches.append((self.name, blocks))
        memory = ctypes.create_string_buffer(ctypes.sizeof(parameters) + emulated.ALIGNMENT)
        offset = -ctypes.addressof(memory) % emulated.ALIGNMENT
        ctypes.memmove(ctypes.addressof(memory) + offset, ctypes.addressof(parameters), len(memory) - 64)

        def run():
            address = ctypes.c_void_p(ctypes.addressof(memory) + offset)
            finished = self.library.run_kernel(address, blocks, threads, self.state.seed)
            assert finished, emulated.fault(self.library)

        on_device(run)


@contextmanager
def emulation(of_head, folder, *, multiprocessors=4, by_rows=True):
    """Inside, `looped_blocks` and the ops of the head run on the CPU, as on Hopper.

    Args:
        of_head: where the kernels of the head are, or will be built.
        folder: where those of the blocks will be.
        by_rows: narrow blocks run the kernel that is for them.
    """
    libraries = {}

    def compiled(source, macros, *_):
        key = source, str(sorted(dict(macros).items()))
        if key not in libraries:
            where = folder / f"looped_blocks_{len(libraries)}"
            where.mkdir()
            libraries[key] = emulated.compile_kernel(source, dict(macros), where)
        return Kernel(libraries[key], Path(source).stem, state)

    def loaded(target, shape, chosen, device):
        return compiled(target.source, defines(shape, chosen))

    facts = driver.Facts("a GPU", (9, 0), multiprocessors, 232_448, 0, 0)
    with emulated_head.emulation(of_head) as state, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: facts.capability)
        patch.setattr(driver, "facts", lambda device: facts)
        patch.setattr(driver, "set_aside_l2", lambda device: None)
        patch.setattr(op, "choose", lambda shape, device: plan.plan_with(shape, device, TILES))
        patch.setattr(op, "_loaded", loaded)
        patch.setattr(looped_rows, "loaded", compiled)
        if not by_rows:
            patch.setattr(looped_rows, "plan_of", lambda *_: None)
        patch.setattr(
            prepare,
            "kernel_on",
            lambda target, device: Kernel(emulated.prepare_library(), "prepare_call", state),
        )
        for cached in (op._kernel, op._why_no_kernel, looped_rows.kernel_on):
            cached.cache_clear()
        yield state
        for cached in (op._kernel, op._why_no_kernel, looped_rows.kernel_on):
            cached.cache_clear()
