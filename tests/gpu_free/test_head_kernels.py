"""The kernels of the vocabulary head compile without a GPU to the machine code they are meant to be."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests are imported by path
import head_kernels  # noqa: E402
import hopper  # noqa: E402

from loopmdm_kernels.cuda import compiler, sources  # noqa: E402

CONTRACT = json.loads((HERE / "head_contract.json").read_text())


def assert_contract(cubin, name):
    """Registers and shared memory as declared, WGMMA and TMA as meant, nothing in local memory."""
    expected = CONTRACT[name]
    assert head_kernels.KERNELS[name].shared_bytes == expected["shared_bytes"]
    counts = hopper.assert_as_declared(cubin, expected)
    assert counts["UTMALDG.3D"] == expected["loads"]
    assert counts["UTMALDG.3D.MULTICAST"] == expected["loads_for_pair"]
    assert counts["USETMAXREG.TRY_ALLOC.CTAPOOL"] == (1 if expected["products"] else 0)


def source_of(name, folder):
    """The kernel's source, with assertions that its parameters lie as they are written."""
    kernel = head_kernels.KERNELS[name]
    lines = [f'#include "cuda/{kernel.source}"']
    if name in head_kernels.PARAMETERS:
        written = head_kernels.PARAMETERS[name]
        lines += hopper.layout(written, f"loopmdm::{written.__name__}")
    for macro, _ in kernel.macros:
        lines.append(f"static_assert(loopmdm::{head_kernels.SHARED[macro]} == {kernel.shared_bytes});")
    path = folder / "kernel.cu"
    path.write_text("\n".join(lines))
    return path


@hopper.needs_nvcc
@hopper.needs_cuobjdump
@pytest.mark.parametrize("name", [name for name in head_kernels.KERNELS if name not in head_kernels.BY_NVRTC])
def test_nvcc(name, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    options = [f"-D{key}={value}" for key, value in head_kernels.KERNELS[name].macros]
    messages = hopper.nvcc_source(str(source_of(name, tmp_path)), options, cubin)
    hopper.assert_nothing_serialised(messages)
    assert_contract(cubin, name)


@hopper.needs_nvrtc
@hopper.needs_cuobjdump
@pytest.mark.parametrize("name", head_kernels.BY_NVRTC)
def test_nvrtc(name, tmp_path):
    kernel = head_kernels.KERNELS[name]
    options = ["-std=c++17", *(f"-D{key}={value}" for key, value in kernel.macros)]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiler.with_nvrtc(sources.folder() / "cuda" / kernel.source, options, "sm_90a"))
    assert_contract(cubin, name)


@hopper.needs_triton
def test_operands_along_their_outer_dimension_are_those_that_triton_writes():
    """64 rows, and 256 columns in panels of 8 KB, by 64 of the inner dimension: both from one layout."""
    found = hopper.described_by_triton("logit_gradients")
    # As outer_major_descriptor makes them (tests/csrc/test_device_functions.py): 2 KB for 16 of the inner.
    assert found["fields"] == [1 << 62 | (1024 >> 4) << 32]
    assert found["steps"] == [(8192 >> 4) << 16 | (2048 * step) >> 4 for step in range(4)]
    assert found["products"] == [["m64n256k16", "1", "1"]] * 4
