"""The backward kernel compiles without a GPU, and its machine code is what it is meant to be."""

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests are imported by path
import builds  # noqa: E402
import hopper  # noqa: E402

from loopmdm_kernels.cuda.looped_blocks_backward import parameters_of_kernel  # noqa: E402
from loopmdm_kernels.schedule import choose_backward  # noqa: E402


@pytest.mark.parametrize("name", builds.each("backward"))
def test_contract(name, built):
    """Registers and shared memory as declared; WGMMA, TMA, moving registers; nothing in local memory."""
    shape, expected = builds.BACKWARD_SHAPES[name], builds.CONTRACTS["backward"][name]
    cubin, _, messages = built("backward", name)
    hopper.assert_nothing_serialised(messages)
    assert choose_backward(shape).shared_bytes == expected["shared_bytes"]
    counts = hopper.assert_as_declared(cubin, expected)
    assert (counts["UTMALDG.3D.MULTICAST"] > 0) == (choose_backward(shape).blocks > 1)
    assert counts["UTMALDG.3D"] > 0 and counts["USETMAXREG.TRY_ALLOC.CTAPOOL"] == 1
    assert counts["REDG.E.ADD.S32.STRONG.GPU"] >= 1
    assert counts["LDG.E.STRONG.GPU"] > 0 and counts["FENCE.VIEW.ASYNC.G"] > 0
    assert not [name for name in counts if re.match(r"(RED|ATOM)\w*\.E\.ADD\.F", name)], "sums have an order"


@hopper.needs_nvcc
def test_parameters_lie_as_the_kernel_reads_them(tmp_path):
    checks = hopper.layout(parameters_of_kernel(), "loopmdm::backward::Parameters")
    source = tmp_path / "offsets.cu"
    source.write_text("\n".join(['#include "cuda/looped_blocks/backward_config_sm90.cuh"', *checks]))
    hopper.nvcc_source(str(source), builds.options_of("backward", "1024 wide"), tmp_path / "out")


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
