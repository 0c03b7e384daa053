"""The kernels' tests pass with the compiler's sanitizers; `make sanitize` runs more of them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sanitize.py")


def script():
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_clean(kind):
    if sys.platform != "linux" or script().preloads(kind) is None:
        pytest.skip(f"the compiler has no shared library of the {kind} sanitizer")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
