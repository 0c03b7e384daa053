"""`make gpu ENV=system`: what it asks of the Python that is there, and that it asks for nothing else."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from bench import needs

ROOT = Path(__file__).parents[2]


def test_what_is_missing_is_named(monkeypatch):
    versions = dict.fromkeys(needs.PACKAGES, "1.0") | {
        "torch": "2.11.0+cu130", "triton": "3.6.0", "cuda-bindings": "13.0.3", "pybind11": "3.0.1"
    }  # fmt: skip

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(needs, "version", version)
    monkeypatch.setattr(needs.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert needs.missing() == []
    del versions["einops"]
    versions |= {"torch": "2.9.1", "triton": "4.0"}
    monkeypatch.setattr(needs.shutil, "which", lambda name: None)
    assert needs.missing() == [
        "torch, 2.10 or later, got 2.9.1", "einops, any version", "the program cmake", "the program ninja"
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["gpu", "gpu-quick", "gpu-tests", "gpu-hopper"])
def test_it_takes_the_python_that_is_there(target):
    """No virtual environment and no pip; results go where they are wanted."""
    variables = ["ENV=system", "PYTHON=/a/python3", "OUT=/a/results", "ARGS=--dry-run"]
    command = ["make", "-C", ROOT, "-n", "--no-print-directory", target, *variables]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[:2] == ["/a/python3 -m bench.needs", "/a/python3 setup.py -q build_ext --inplace"]
    (line,) = lines[2:]
    assert line.startswith("/a/python3 -m bench.gpu") and line.endswith("--out '/a/results' --dry-run")
