"""The kernels for Hopper as their tests build them, each once for all tests of a run."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import head_kernels
import hopper
import pytest

from loopmdm_kernels.cuda import looped_blocks_backward, looped_rows, sources
from loopmdm_kernels.cuda.parameters import backward_defines
from loopmdm_kernels.locks import Lock
from loopmdm_kernels.schedule import BlockShape, RowsPlan, choose_backward, choose_rows

HERE = Path(__file__).parent
BACKWARD_SHAPES = {
    "small, 8 x 1024 tokens": BlockShape(8, 1024, 768, 12, 3072, 2),
    "small, 16 x 128 tokens": hopper.SHAPES["small, 16 x 128 tokens"],
    "1024 wide": BlockShape(1, 1024, 1024, 16, 4096, 2),
}
ROWS_SHAPES = {
    **{
        name: hopper.SHAPES[name] for name in hopper.SHAPES if name.startswith("sudoku") and "256" not in name
    },
    "16 tokens": BlockShape(1, 16, 128, 4, 512, 2),  # of a cluster of two
}
# A compilation takes seconds: these by NVRTC, the others by nvcc.
BY_NVRTC = {
    "forward": ("small, 128 tokens",),
    "backward": (),
    "rows": ("16 tokens",),
    "head": ("sample_rows, 64 rows", "gradient_product, rows"),
}
CONTRACTS = {
    "forward": json.loads((HERE / "hopper_contract.json").read_text()),
    "backward": json.loads((HERE / "hopper_backward_contract.json").read_text()),
    "rows": json.loads((HERE / "hopper_rows_contract.json").read_text()),
    "head": json.loads((HERE / "head_contract.json").read_text()),
}
NAMES = {
    "forward": hopper.SHAPES,
    "backward": BACKWARD_SHAPES,
    "rows": ROWS_SHAPES,
    "head": head_kernels.KERNELS,
}
SOURCES = {"forward": hopper.SOURCE, "backward": looped_blocks_backward.SOURCE, "rows": looped_rows.SOURCE}


class Build(NamedTuple):
    cubin: Path
    ptx: str
    messages: str  # of the assembler; NVRTC has none


def rows_plan(name: str) -> RowsPlan:
    plan = choose_rows(ROWS_SHAPES[name])
    assert plan is not None
    return plan


def source_of(family: str, name: str) -> str:
    """The kernel's file in csrc/cuda."""
    return head_kernels.KERNELS[name].source if family == "head" else SOURCES[family]


def options_of(family: str, name: str) -> list[str]:
    if family == "head":
        macros = dict(head_kernels.KERNELS[name].macros)
    elif family == "forward":
        return hopper.macros(hopper.SHAPES[name])
    elif family == "rows":
        macros = looped_rows.defines(ROWS_SHAPES[name], rows_plan(name))
    else:
        shape = BACKWARD_SHAPES[name]
        macros = backward_defines(shape, choose_backward(shape))
    return [f"-D{key}={value}" for key, value in macros.items()]


class Builds:
    """What is built is in a folder that all processes of the run share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cache  # noqa: B019 - one for the run
    def __call__(self, family: str, name: str) -> Build:
        by_nvrtc = name in BY_NVRTC[family]
        if hopper.tool("cuobjdump") is None or hopper.tool("nvdisasm") is None:
            pytest.skip("there is no cuobjdump or no nvdisasm")
        for mark in (hopper.needs_nvrtc if by_nvrtc else hopper.needs_nvcc,):
            if mark.args[0]:
                pytest.skip(mark.kwargs["reason"])
        folder = self._folder / f"{family} {name}"
        folder.mkdir(parents=True, exist_ok=True)
        with Lock(folder / "lock", "a build", wait=True):
            if not (folder / "messages.txt").exists():
                messages = (_by_nvrtc if by_nvrtc else _by_nvcc)(family, name, folder)
                (folder / "messages.txt").write_text(messages)
        cubin, text, messages = (folder / each for each in ("kernel.cubin", "kernel.ptx", "messages.txt"))
        return Build(cubin, text.read_text(), messages.read_text())


def _by_nvcc(family: str, name: str, folder: Path) -> str:
    source = folder / "kernel.cu"
    lines = [f'#include "cuda/{source_of(family, name)}"']
    if family == "head":
        lines += head_kernels.assertions(name)
    source.write_text("\n".join(lines))
    options = [*options_of(family, name), "--keep", f"--keep-dir={folder}"]
    return hopper.nvcc_source(str(source), options, folder / "kernel.cubin")


def _by_nvrtc(family: str, name: str, folder: Path) -> str:
    source = sources.folder() / "cuda" / source_of(family, name)
    text, cubin = hopper.nvrtc(source.read_text(), ["-std=c++17", *options_of(family, name)])
    (folder / "kernel.ptx").write_text(text)
    (folder / "kernel.cubin").write_bytes(cubin)
    return ""


def each(family: str, *, loading: bool = False) -> list[Any]:
    """Parameters of a test: the names of a family, or of those of its kernels that load and multiply."""
    return [name for name in NAMES[family] if not loading or CONTRACTS[family][name]["products"]]
