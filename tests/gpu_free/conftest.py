"""The argument `built` of a test: kernels, compiled once for all tests of a run."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path
from builds import Builds


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """`built(family, name)`: the kernel, or the test is skipped; see builds.py."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes
    return Builds(folder / "kernels")
