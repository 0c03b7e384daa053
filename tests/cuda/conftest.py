"""What the tests of the vocabulary head share: their emulated kernels are compiled once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path
import emulated_head


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def gpu(emulated_kernels):
    """Inside, the kernels of the head run on the CPU; see `emulated_head.emulation`."""
    with emulated_head.emulation(emulated_kernels) as state:
        yield state
