"""The Triton kernels compiled for GPUs that are not here: what they take must not grow beyond the table.

A part of the table is compiled again, in a process of its own, where Triton is not its interpreter. After a
change that is meant, `python -m bench.probes.triton_resources` writes the table anew.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
MADE_WITH = "3.9."

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "tests/gpu_free/triton_resources.json").read_text())
SHARED_LIMIT = 101_376  # bytes a block may have on every GPU from Ampere on, GeForce too
SPILLS_ALLOWED = 0
# Budgets: rotated keys (tiles of 16 queries would need none), e4m3 weights that are widened by shifts,
# and fp32 with dropout, which holds the offsets of rows that need be no multiple of 16.
MORE_SPILLS_ALLOWED = {
    "attention_gradient_kernel sm_80 OF_KEYS=True": 23,
    "masked_cross_entropy_kernel sm_80": 3,
    "residual_linear_kernel sm_90 BRANCH=1,DROPOUT=True,BLOCK_M=64,BLOCK_N=64,BLOCK_K=16": 2,
}
NO_PRODUCTS = {
    "branch_backward_kernel",
    "exit_kernel",
    "masked_cross_entropy_combine_kernel",
    "modulated_rows_backward_kernel",
    "modulated_rows_kernel",
    "row_moments_kernel",
    "sample_rows_combine_kernel",
}
COMPILED = [
    "residual_linear_kernel sm_90",
    "norm_linear_kernel sm_90",
    "sample_rows_kernel sm_90",
    "attention_kernel sm_80",
    "attention_gradient_kernel sm_90 OF_KEYS=True",
    "weight_gradient_kernel sm_100",
]


def test_limits():
    for name, used in TABLE.items():
        _, dtype, kernel = name.split()[:3]
        assert used["shared"] <= SHARED_LIMIT, name
        assert used["registers"] <= 255, name
        computes = kernel not in NO_PRODUCTS and dtype != "float32"
        assert (used["tensor_core_products"] > 0) == computes, name
        more = [spills for start, spills in MORE_SPILLS_ALLOWED.items() if f" {start}" in name]
        assert used["spills"] <= max(more, default=SPILLS_ALLOWED), name


@pytest.mark.skipif(
    not version("triton").startswith(MADE_WITH),
    reason=f"the table is of Triton {MADE_WITH}x; another compiles otherwise",
)
def test_nothing_takes_more_than_the_table_says(tmp_path):
    names = [next(n for n in TABLE if f"bfloat16 {start}" in n) for start in COMPILED]
    names.append(next(n for n in TABLE if "norm_linear_kernel sm_90" in n and "fp8e4nv" in n))
    (tmp_path / "names.json").write_text(json.dumps(names))
    command = [sys.executable, "-m", "bench.probes.triton_resources", "--names", tmp_path / "names.json"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert list(compiled) == names
    for name, used in compiled.items():
        for resource in ("registers", "shared", "spills"):
            assert used[resource] <= TABLE[name][resource], (name, resource)
        assert used["tensor_core_products"] > 0
