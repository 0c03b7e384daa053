"""The kernels of the vocabulary head compile without a GPU to the machine code they are meant to be."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests are imported by path
import builds  # noqa: E402
import head_kernels  # noqa: E402
import hopper  # noqa: E402


def assert_contract(cubin, name):
    """Registers and shared memory as declared, WGMMA and TMA as meant, nothing in local memory."""
    expected = builds.CONTRACTS["head"][name]
    assert head_kernels.KERNELS[name].shared_bytes == expected["shared_bytes"]
    counts = hopper.assert_as_declared(cubin, expected)
    assert counts["UTMALDG.3D"] == expected["loads"]
    assert counts["UTMALDG.3D.MULTICAST"] == expected["loads_for_pair"]
    assert counts["USETMAXREG.TRY_ALLOC.CTAPOOL"] == (1 if expected["products"] else 0)


@pytest.mark.parametrize("name", builds.each("head"))
def test_contract(name, built):
    build = built("head", name)
    if build.messages:
        hopper.assert_nothing_serialised(build.messages)
    assert_contract(build.cubin, name)


@hopper.needs_triton
def test_operands_along_their_outer_dimension_are_those_that_triton_writes():
    """64 rows, and 256 columns in panels of 8 KB, by 64 of the inner dimension: both from one layout."""
    found = hopper.described_by_triton("logit_gradients")
    # As outer_major_descriptor makes them (tests/csrc/test_device_functions.py): 2 KB for 16 of the inner.
    assert found["fields"] == [1 << 62 | (1024 >> 4) << 32]
    assert found["steps"] == [(8192 >> 4) << 16 | (2048 * step) >> 4 for step in range(4)]
    assert found["products"] == [["m64n256k16", "1", "1"]] * 4
