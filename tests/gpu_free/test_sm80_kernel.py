"""The kernel for Ampere and Ada compiles without a GPU, and its machine code is what it is meant to be."""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests are imported by path
import hopper  # noqa: E402

from loopmdm_kernels.cuda import compiler, sources, targets  # noqa: E402
from loopmdm_kernels.schedule import BlockShape, Device, choose  # noqa: E402
from loopmdm_kernels.schedule.device import ASSUMED  # noqa: E402

CONTRACT = json.loads((HERE / "sm80_contract.json").read_text())


class Case(NamedTuple):
    arch: str
    device: Device
    shape: BlockShape


SMALL = BlockShape(1, 1024, 768, 12, 3072, 2)
CASES = {
    "A100, 1024 tokens": Case("sm_80", ASSUMED[8, 0], SMALL),
    "sm_86, heads of 128": Case("sm_86", ASSUMED[8, 6], BlockShape(1, 1024, 1024, 8, 4096, 2)),
    "sm_89, heads of 32": Case("sm_89", ASSUMED[8, 9], BlockShape(1, 128, 256, 8, 1024, 2)),
}
BY_NVRTC = "sm_89, heads of 32"


def assert_contract(cubin, name):
    """Registers and shared memory as declared; mma.sync, asynchronous copies; nothing in local memory."""
    case, expected = CASES[name], CONTRACT[name]
    plan = choose(case.shape, case.device)
    assert plan.shared_bytes == expected["shared_bytes"] <= case.device.shared_bytes
    counts = hopper.assert_as_declared(cubin, expected, "HMMA")
    # Copies past L1, which may hold old lines; operands by ldmatrix, values transposed on the way.
    copies = [name for name in counts if name.startswith("LDGSTS")]
    assert copies and all("BYPASS" in name for name in copies)
    assert counts["LDSM.16.M88.4"] > 0 and counts["LDSM.16.MT88.4"] > 0
    # Signals are releases at the scope of the GPU, waits acquires.
    assert any(re.match(r"RED\w*\.E\.ADD(\.S32)?\.STRONG\.GPU", name) for name in counts)
    assert counts["LDG.E.STRONG.GPU"] > 0


@hopper.needs_nvcc
@hopper.needs_cuobjdump
@pytest.mark.parametrize("name", [name for name in CASES if name != BY_NVRTC])
def test_nvcc(name, tmp_path):
    cubin, case = tmp_path / "kernel.cubin", CASES[name]
    messages = hopper.nvcc(case.shape, cubin, targets.SM80.source, case.arch, case.device)
    hopper.assert_nothing_serialised(messages)
    assert_contract(cubin, name)


@hopper.needs_nvrtc
@hopper.needs_cuobjdump
def test_nvrtc(tmp_path):
    cubin, case = tmp_path / "kernel.cubin", CASES[BY_NVRTC]
    options = ["-std=c++17", *hopper.macros(case.shape, case.device)]
    cubin.write_bytes(
        compiler.with_nvrtc(sources.folder() / "cuda" / targets.SM80.source, options, case.arch)
    )
    assert_contract(cubin, BY_NVRTC)
