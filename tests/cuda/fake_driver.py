"""A CUDA driver that takes notes, in the place of cuda.bindings.driver."""

import sys
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from loopmdm_kernels.cuda import driver, launch, looped_rows, weights
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda import looped_blocks_backward as backward

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from cuda.bindings import driver as real

ATTRIBUTES = real.CUfunction_attribute
SUCCESS = real.CUresult.CUDA_SUCCESS
WITHOUT_CONTEXT = ("cuDriverGetVersion", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName")
FUNCTIONS = {
    "cuDriverGetVersion": lambda: (SUCCESS, 13000),
    "cuDeviceGet": lambda device: (SUCCESS, device),
    "cuModuleLoadData": lambda cubin: (SUCCESS, cubin),
    "cuModuleGetFunction": lambda module, name: (SUCCESS, name),
    "cuFuncSetAttribute": lambda *_: (SUCCESS,),
    "cuFuncGetAttribute": lambda name, _: (SUCCESS, 168 * (name is ATTRIBUTES.CU_FUNC_ATTRIBUTE_NUM_REGS)),
    "cuTensorMapEncodeTiled": lambda *_: (SUCCESS, real.CUtensorMap()),
    "cuLaunchKernelEx": lambda *_: (SUCCESS,),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": lambda *_: (SUCCESS, 1),
    "cuOccupancyMaxActiveClusters": lambda *_: (SUCCESS, 1),
    "cuCtxGetLimit": lambda limit: (SUCCESS, 0),
    "cuCtxSetLimit": lambda limit, size: (SUCCESS,),
    "cuCtxResetPersistingL2Cache": lambda: (SUCCESS,),
}


class FakeDriver:
    """The real module's types, and functions that do nothing; those given by name do something.

    `calls` has the names of all that were called, each with its thread. The thread that makes this has a
    context, others have none before they are given one, and functions that need one fail without.
    """

    def __init__(self, **functions):
        self.calls = []
        self._contexts = {threading.current_thread(): 1}
        own = {
            "cuCtxGetCurrent": lambda: (SUCCESS, self._contexts.get(threading.current_thread(), 0)),
            "cuDevicePrimaryCtxRetain": lambda device: (SUCCESS, 100 + (device or 0)),
            "cuCtxSetCurrent": self._set_current,
        }
        types = {name: getattr(real, name) for name in dir(real) if name.startswith("CU") or "uint" in name}
        noted = {
            name: self._noted(name, function, needs_context=name not in (*WITHOUT_CONTEXT, *own))
            for name, function in {**FUNCTIONS, **own, **functions}.items()
        }
        self.module = SimpleNamespace(**types, **noted)

    def install(self, monkeypatch):
        import cuda.bindings

        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", self.module)
        monkeypatch.setattr(cuda.bindings, "driver", self.module)
        return self

    def named(self, name, thread=None):
        """How often a function was called, in one thread or in all."""
        return sum(each == name and thread in (None, of) for each, of in self.calls)

    def _set_current(self, context):
        self._contexts[threading.current_thread()] = context
        return (SUCCESS,)

    def _noted(self, name, function, *, needs_context):
        def call(*arguments):
            self.calls.append((name, threading.current_thread()))
            if needs_context and not self._contexts.get(threading.current_thread()):
                return (real.CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
            return function(*arguments)

        call.__name__ = name
        return call


FACTS = driver.Facts("a GPU", (9, 0), 132, 232_448, 1000, 2000)


@contextmanager
def hopper(monkeypatch, **functions):
    """Inside, calls on tensors of the CPU find Hopper by a driver that takes notes; no kernel is compiled."""
    caches = (
        launch.loaded, launch._why_refused, op._kernel, op._why_no_kernel, looped_rows.kernel_on,
        backward.kernel_on,
    )  # fmt: skip
    fake = FakeDriver(**functions).install(monkeypatch)
    stream = SimpleNamespace(cuda_stream=7, record_event=lambda event: event)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: FACTS.capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(driver, "facts", lambda device: FACTS)
    monkeypatch.setattr(driver, "_set_aside", {})
    monkeypatch.setattr(launch, "compile_kernel", lambda *_: b"cubin")
    for cached in caches:
        cached.cache_clear()
    weights.clear()
    yield fake
    for cached in caches:
        cached.cache_clear()
    weights.clear()
