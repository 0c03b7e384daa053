"""The Hopper kernel compiles without a GPU, and its machine code is what it is meant to be."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests are imported by path
import builds  # noqa: E402
import hopper  # noqa: E402

from loopmdm_kernels.cuda import prepare, targets  # noqa: E402
from loopmdm_kernels.schedule import choose  # noqa: E402


def assert_contract(cubin, name):
    """Registers and shared memory as declared; WGMMA, TMA, moving registers; nothing in local memory."""
    plan, expected = choose(hopper.SHAPES[name]), builds.CONTRACTS["forward"][name]
    assert plan.shared_bytes == expected["shared_bytes"]
    counts = hopper.assert_as_declared(cubin, expected)
    assert counts["UTMALDG.3D"] > 0 and counts["USETMAXREG.TRY_ALLOC.CTAPOOL"] == 1
    # Signals are releases at the scope of the GPU, waits acquires; TMA must not overtake either.
    assert counts["FENCE.VIEW.ASYNC.G"] > 0
    assert counts["FENCE.VIEW.ASYNC.S"] == 1, "of initialised barriers"
    assert counts["REDG.E.ADD.S32.STRONG.GPU"] >= 2 and counts["LDG.E.STRONG.GPU"] > 0


def test_a_part_of_a_package_is_not_the_package(tmp_path, monkeypatch):
    """cuda-core and cuda-pathfinder make a package `cuda` too, without the bindings."""
    (tmp_path / "somewhere" / "core").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert hopper.installed("somewhere") and hopper.installed("somewhere.core")
    assert not hopper.installed("somewhere.bindings") and not hopper.installed("nowhere.bindings")


@pytest.mark.parametrize("name", builds.each("forward"))
def test_contract(name, built):
    build = built("forward", name)
    if build.messages:
        hopper.assert_nothing_serialised(build.messages)
    assert_contract(build.cubin, name)


@hopper.needs_nvcc
@pytest.mark.parametrize("target", [targets.SM80, targets.SM90], ids=lambda target: target.architecture)
def test_parameters_lie_as_the_kernel_reads_them(target, tmp_path):
    config = target.entry.replace("looped_blocks", "config")
    source = tmp_path / "offsets.cu"
    checks = hopper.layout(target.parameters, "loopmdm::KernelParameters")
    source.write_text("\n".join([f'#include "cuda/tile/{config}.cuh"', *checks]))
    shape = next(iter(hopper.SHAPES.values()))
    hopper.nvcc(shape, tmp_path / "out", str(source), target.architecture)


@hopper.needs_nvcc
@hopper.needs_cuobjdump
@pytest.mark.parametrize("target", [targets.SM80, targets.SM90], ids=lambda target: target.architecture)
def test_what_runs_before_a_call(target, tmp_path):
    """Its parameters lie as the host writes them, and nothing is in local memory."""
    source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    checks = hopper.layout(prepare.Arguments, "loopmdm::PrepareArguments")
    source.write_text("\n".join([f'#include "cuda/{prepare.SOURCE}"', *checks]))
    messages = hopper.nvcc_source(str(source), [], cubin, target.architecture)
    hopper.assert_nothing_serialised(messages)
    used = hopper.resources(cubin)
    assert used["REG"] <= 40 and used["STACK"] == used["LOCAL"] == 0


@hopper.needs_triton
def test_descriptors_are_those_that_triton_writes(tmp_path):
    """Keys and values as operands, against another compiler's layout of the same operands.

    Triton puts constant fields in one `or` and address steps in additions.
    """
    found = hopper.described_by_triton("attention")
    loaded = hopper.device_functions(tmp_path)
    high = 0xFFFFFFFF00000000
    assert found["inner"]["fields"] == [loaded.inner_major_c(0, 0, 128, 1) & high]
    assert found["outer"]["fields"] == [loaded.outer_major_c(0, 128 * 128, 0, 128) & high]
    for size in (16, 32):
        assert found[f"inner of {size}"]["fields"] == [loaded.inner_major_c(0, 0, 2 * size, 1) & high]
        # The probabilities have a descriptor too: 128 columns, like the first of all.
        values = loaded.outer_major_c(0, 128 * 2 * size, 0, 2 * size) & high
        assert set(found[f"outer of {size}"]["fields"]) == {values, *found["inner"]["fields"]}
    # 128 values of 128 columns: two panels of 128 rows; eight steps of 16 rows.
    steps = [loaded.outer_major_c(0, 128 * 128, step, 128) & ~high for step in range(8)]
    assert found["outer"]["steps"] == steps
