"""The argument `backend` of a test: it runs once for each backend of the ops that this machine can play.

- reference: plain PyTorch;
- cpu: the CPU kernels, once for each instruction set of this machine; best: with the best one alone;
- triton: its kernels on a GPU where there is one, else in its interpreter;
- cuda: the kernels for Hopper, their sources run thread by thread on the CPU; gpu: on a GPU.

Two markers choose: `backends(...)` names those that a test runs over, and `by_backend(name, reference=[...],
cpu=[...], ...)` gives the argument `name` values for each; of a backend that is not named there are none, but
for best, which has the values of cpu, and gpu, which has those of cuda. An argument `dtype` takes what the
backend computes in.
"""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from tests.cuda import emulated_head
from tests.triton.interpreted import interpreted

os.environ["LOOPMDM_QUALIFY"] = "0"  # no test depends on a verdict in the user's folder
USABLE_ISAS = _C.usable_cpu_isas().split(", ")
ON_GPU = torch.cuda.is_available()
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = {
    "reference": (FLOAT, BF16, HALF),
    "cpu": (FLOAT, BF16),
    "triton": (FLOAT, BF16, HALF),
    "cuda": (BF16,),
}
NAMES = {FLOAT: "fp32", BF16: "bf16", HALF: "fp16", None: "same"}
ALL = ("reference", "cpu", "triton", "cuda", "gpu")


class Backend(NamedTuple):
    kind: str
    isa: str = ""

    @property
    def name(self) -> str:
        """As `use_backend` takes it."""
        return {"best": "cpu", "gpu": "cuda"}.get(self.kind, self.kind)

    @property
    def device(self) -> torch.device:
        on_gpu = self.kind == "gpu" or (self.kind == "triton" and ON_GPU)
        return torch.device("cuda" if on_gpu else "cpu")

    @property
    def emulated(self) -> bool:
        """Whether a call takes seconds where others take milliseconds."""
        return self.kind == "cuda" or (self.kind == "triton" and not ON_GPU)

    def __str__(self) -> str:
        return f"{self.name}_{self.isa}" if self.isa else self.kind


def _backends(kinds: list[str]) -> list[Backend]:
    found = []
    for kind in kinds:
        if kind in ("cpu", "best"):
            found += [Backend(kind, isa) for isa in (USABLE_ISAS if kind == "cpu" else [_C.cpu_isa()])]
        else:
            found.append(Backend(kind))
    return found


def _kinds(chosen: tuple[str, ...], lists: list[dict[str, object]]) -> list[str]:
    """Of the chosen ones, those that all arguments have values for; best for cpu where one names it."""
    if any("best" in values for values in lists):
        chosen = tuple("best" if kind == "cpu" else kind for kind in chosen)
    instead = {"best": "cpu", "gpu": "cuda"}
    return [kind for kind in chosen if all(kind in v or instead.get(kind) in v for v in lists)]


def _of(values: dict[str, object], backend: Backend) -> object:
    return values[backend.kind if backend.kind in values else backend.name]


def _id(value: object) -> str | None:
    if isinstance(value, (tuple, list)):
        return "x".join(_id(item) or str(item) for item in value) or "none"
    return NAMES.get(value) if value is None or isinstance(value, torch.dtype) else str(value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames or _parametrized(metafunc, "backend"):
        return
    lists = {}
    for marker in metafunc.definition.iter_markers("by_backend"):
        lists[marker.args[0]] = marker.kwargs
    chosen = metafunc.definition.get_closest_marker("backends")
    kinds = _kinds(chosen.args if chosen else ALL, list(lists.values()))
    if "dtype" in metafunc.fixturenames and "dtype" not in lists and not _parametrized(metafunc, "dtype"):
        lists["dtype"] = DTYPES
    rows = []
    for backend in _backends(kinds):
        gpu = [pytest.mark.gpu] if backend.kind == "gpu" or backend.device.type == "cuda" else []
        for values in itertools.product(*(_of(each, backend) for each in lists.values())):
            name = "-".join(filter(None, (str(backend), *map(_id, values))))
            rows.append(pytest.param(backend, *values, id=name, marks=gpu))
    metafunc.parametrize(("backend", *lists), rows, indirect=["backend"])


def _parametrized(metafunc: pytest.Metafunc, name: str) -> bool:
    for marker in metafunc.definition.iter_markers("parametrize"):
        names = marker.args[0]
        if name in (names.replace(" ", "").split(",") if isinstance(names, str) else names):
            return True
    return False


@pytest.fixture
def backend(request, monkeypatch):
    """Inside, the ops use this backend."""
    chosen: Backend = request.param
    with ExitStack() as inside:
        if chosen.isa:
            monkeypatch.setenv("LOOPMDM_CPU_ISA", chosen.isa)
            assert _C.cpu_isa() == chosen.isa
        elif chosen.kind == "triton":
            pytest.importorskip("triton", reason="Triton is not installed")
            if not ON_GPU:
                inside.enter_context(interpreted())
        elif chosen.kind == "cuda":
            request.getfixturevalue("gpu")
        elif chosen.kind == "gpu" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        inside.enter_context(lk.use_backend(chosen.name))
        yield chosen


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def gpu(emulated_kernels):
    """Inside, the kernels of the head run on the CPU; see `emulated_head.emulation`."""
    with emulated_head.emulation(emulated_kernels) as state:
        yield state


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
