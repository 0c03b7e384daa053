"""Offsets of the Triton kernels are 64-bit: no index is multiplied by a run-time size in 32 bits.

Seen in the first stage of the compiler, in a process of its own, where Triton is not its interpreter. An
index alone (a row, a column, a token) stays below 2^31; what is computed from it and a size need not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]
ALLOWED = {
    # The number of tiles of a persistent kernel.
    **dict.fromkeys(
        ("linear_kernel", "norm_linear_kernel", "residual_linear_kernel", "weight_gradient_kernel"), 1
    ),
    # Rotary angles [L, K / 2] of queries and of keys: no sequence of 2^31 / K positions attends to itself.
    **dict.fromkeys(("attention_kernel", "attention_gradient_kernel"), 2),
}


def test_no_product_of_run_time_numbers_is_32_bits_wide():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", ROOT / "tests/gpu_free/triton_offsets.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("narrow_kernel") != []  # the check sees what it is for
    table = json.loads((ROOT / "tests/gpu_free/triton_resources.json").read_text())
    assert found.keys() == {name.split()[2] for name in table}
    for kernel, products in found.items():
        assert len(products) <= ALLOWED.get(kernel, 0), (kernel, products)
