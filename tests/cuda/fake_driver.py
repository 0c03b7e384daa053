"""A CUDA driver that takes notes, in the place of cuda.bindings.driver."""

import sys
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
from cuda.bindings import driver as real

SUCCESS = real.CUresult.CUDA_SUCCESS
WITHOUT_CONTEXT = ("cuDriverGetVersion", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName")
FUNCTIONS = {
    "cuDriverGetVersion": lambda: (SUCCESS, 13000),
    "cuDeviceGet": lambda device: (SUCCESS, device),
    "cuModuleLoadData": lambda cubin: (SUCCESS, cubin),
    "cuModuleGetFunction": lambda module, name: (SUCCESS, name),
    "cuFuncSetAttribute": lambda *_: (SUCCESS,),
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
            "cuDevicePrimaryCtxRetain": lambda device: (SUCCESS, 100 + device),
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
