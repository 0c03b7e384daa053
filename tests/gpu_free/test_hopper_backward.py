"""The backward kernel compiles without a GPU, and its machine code is what it is meant to be."""

import json
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests are imported by path
import hopper  # noqa: E402

from loopmdm_kernels.cuda.looped_blocks_backward import SOURCE, parameters_of_kernel  # noqa: E402
from loopmdm_kernels.cuda.parameters import backward_defines  # noqa: E402
from loopmdm_kernels.schedule import BlockShape, choose_backward  # noqa: E402

CONTRACT = json.loads((HERE / "hopper_backward_contract.json").read_text())
SHAPES = {
    "small": hopper.SHAPES["small, 1024 tokens"],
    "1024 wide": BlockShape(1, 1024, 1024, 16, 4096, 2),
}


def macros(shape):
    return [f"-D{name}={value}" for name, value in backward_defines(shape, choose_backward(shape)).items()]


@hopper.needs_nvcc
@hopper.needs_cuobjdump
@pytest.mark.parametrize("name", SHAPES)
def test_contract(name, tmp_path):
    """Registers and shared memory as declared; WGMMA, TMA, moving registers; nothing in local memory."""
    shape, expected = SHAPES[name], CONTRACT[name]
    cubin = tmp_path / "kernel.cubin"
    messages = hopper.nvcc_source(SOURCE, macros(shape), cubin)
    hopper.assert_nothing_serialised(messages)
    assert choose_backward(shape).shared_bytes == expected["shared_bytes"]
    counts = hopper.assert_as_declared(cubin, expected)
    assert counts["UTMALDG.3D"] > 0 and counts["USETMAXREG.TRY_ALLOC.CTAPOOL"] == 1
    assert counts["REDG.E.ADD.S32.STRONG.GPU"] >= 1
    assert counts["LDG.E.STRONG.GPU"] > 0 and counts["FENCE.VIEW.ASYNC.G"] > 0
    assert not [name for name in counts if re.match(r"(RED|ATOM)\w*\.E\.ADD\.F", name)], "sums have an order"


@hopper.needs_nvcc
def test_parameters_lie_as_the_kernel_reads_them(tmp_path):
    checks = hopper.layout(parameters_of_kernel(), "loopmdm::backward::Parameters")
    source = tmp_path / "offsets.cu"
    source.write_text("\n".join(['#include "cuda/looped_blocks/backward_config_sm90.cuh"', *checks]))
    hopper.nvcc_source(str(source), macros(SHAPES["small"]), tmp_path / "out")


@hopper.needs_triton
def test_operands_read_across_are_described_as_triton_describes_them(tmp_path):
    """A weight gradient: both operands lie with the tokens, its inner dimension, in rows."""
    found = hopper.described_by_triton("weight_gradient")
    across = {tuple(words) for _, *words in found["products"]}
    assert across == {("1", "1")}, "both, in the instruction's last two words"
    describe = hopper.device_functions(tmp_path).outer_major_c
    high, panel = 0xFFFFFFFF00000000, 64 * 128
    assert found["fields"] == [describe(0, panel, 0, 128) & high]
    # 64 tokens of 128 columns: two panels of 64 rows; four steps of 16 rows.
    assert found["steps"] == [describe(0, panel, step, 128) & ~high for step in range(4)]
