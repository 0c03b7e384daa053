"""The kernel for narrow blocks compiles without a GPU, and its machine code is what it is meant to be."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests are imported by path
import builds  # noqa: E402
import hopper  # noqa: E402

from bench.probes import hopper_facts  # noqa: E402
from loopmdm_kernels.cuda import looped_rows  # noqa: E402
from loopmdm_kernels.schedule import choose_rows  # noqa: E402


@pytest.mark.parametrize("name", builds.each("rows"))
def test_contract(name, built):
    """Registers and shared memory as declared; WGMMA, TMA for all blocks; nothing in local memory."""
    plan, expected = builds.rows_plan(name), builds.CONTRACTS["rows"][name]
    cubin, _, messages = built("rows", name)
    if messages:
        hopper.assert_nothing_serialised(messages)
    assert plan.shared_bytes == expected["shared_bytes"]
    counts = hopper.assert_as_declared(cubin, expected)
    assert counts["UTMALDG.3D"] == 5, "weights of each product"
    assert counts["UTMALDG.3D.MULTICAST"] == 2 * builds.ROWS_SHAPES[name].hidden // 64, "keys and values"
    assert counts["FENCE.VIEW.ASYNC.G"] == 4, "on either side of the meetings before keys and values are sent"
    assert counts["FENCE.VIEW.ASYNC.S"] > 1
    assert counts["UCGABAR_ARV"] == counts["UCGABAR_WAIT"] == 2, "before the first and behind the last"


@hopper.needs_nvcc
def test_parameters_lie_as_the_kernel_reads_them(tmp_path):
    checks = hopper.layout(looped_rows.Parameters, "loopmdm::looped_rows::KernelParameters")
    source = tmp_path / "offsets.cu"
    source.write_text("\n".join(['#include "cuda/looped_blocks/rows_config_sm90.cuh"', *checks]))
    hopper.nvcc_source(str(source), builds.options_of("rows", "16 tokens"), tmp_path / "out")


@hopper.needs_nvrtc
@hopper.needs_cuobjdump
def test_the_pieces_that_are_timed_are_still_there(tmp_path):
    """The compiler leaves out products whose sums nobody reads."""
    plan, cubin = choose_rows(hopper_facts.SUDOKU), tmp_path / "kernel.cubin"
    options = tuple(hopper_facts.narrow_options(plan))
    cubin.write_bytes(hopper_facts._cubin("hopper_narrow.cu", options))
    counts, kernel = hopper.instructions(cubin), builds.CONTRACTS["rows"]["sudoku, heads of 32"]["products"]
    products = {name: number for name, number in counts.items() if name.startswith("HGMMA")}
    assert products == {**kernel, "HGMMA.64x8x16.F32.BF16": kernel["HGMMA.64x8x16.F32.BF16"] + 4}
    assert counts["UTMALDG.3D.MULTICAST"] == 4 + 4 and counts["UTMALDG.3D"] == 5 + 1
