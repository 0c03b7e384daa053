"""What an import brings in: by lists of modules and of libraries, not by a clock."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each takes as long to import as all of this package, or longer.
HEAVY = (
    "torch._dynamo", "torch._inductor", "sympy", "transformers", "datasets", "tokenizers", "pyarrow",
    "matplotlib", "scipy", "lightning", "peft", "cuda.bindings.nvrtc", "cuda.bindings.driver",
)  # fmt: skip
IMPORTS = {
    "kernels": "import loopmdm_kernels",
    "model": "from loopmdm import ComputePlan, LoopMDM, LoopMDMConfig, likelihood, patch, sample",
    "losses": "import loopmdm.losses",
    "triton": "import loopmdm_kernels.triton.looped_blocks, loopmdm_kernels.triton.sample_rows",
    "cuda": "import loopmdm_kernels.cuda.looped_blocks, loopmdm_kernels.cuda.masked_cross_entropy",
}
CODE = """
import sys
LIBRARIES = ("libcuda.", "libcudart", "libnvrtc", "libcublas", "libcudnn", "libnvJitLink", "libcupti")

def loaded():
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if "/" in line}
    except FileNotFoundError:
        return set()
    return {file for file in files if file.rsplit("/", 1)[-1].startswith(LIBRARIES)}

import torch  # a build for CUDA loads its libraries itself
before, modules = loaded(), set(sys.modules)
opened = []
sys.addaudithook(lambda name, given: name == "ctypes.dlopen" and opened.append(str(given[0])))
exec(sys.argv[1])
assert not loaded() - before, loaded() - before
assert not [name for name in opened if name.rsplit("/", 1)[-1].startswith(LIBRARIES)], opened
assert not torch.cuda.is_initialized()
new = set(sys.modules) - modules
assert any(name.startswith("loopmdm") for name in new)
heavy = sorted(name for name in sys.argv[2].split() if name in new)
assert not heavy, heavy
"""


@pytest.mark.parametrize("name", IMPORTS)
def test_nothing_heavy_and_no_cuda_library(name):
    if name == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-W", "error", "-c", CODE, IMPORTS[name], " ".join(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
