"""The Triton kernels compiled for GPUs that are not here: what they take must not grow beyond the table.

A part of the table is compiled again, in a process of its own, where Triton is not its interpreter. After a
change that is meant, `python -m bench.triton_resources` writes the table anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "tests/gpu_free/triton_resources.json").read_text())
SHARED_LIMIT = 101_376  # bytes a block may have on every GPU from Ampere on, GeForce too
SPILLS_ALLOWED = 0
MORE_SPILLS_ALLOWED = {"key_gradient_kernel sm_80": 32}
# What computes with tensor cores, in narrow dtypes.
PRODUCTS = (
    "linear",
    "weight_gradient",
    "attention",
    "_gradient_kernel",
    "sample_kernel",
    "cross_entropy_kernel",
)
COMPILED = [
    "residual_linear_kernel sm_90",
    "norm_linear_kernel sm_90",
    "sample_kernel sm_90",
    "attention_kernel sm_80",
    "key_gradient_kernel sm_90",
    "weight_gradient_kernel sm_100",
]


def test_limits():
    for name, used in TABLE.items():
        _, dtype, kernel, arch = name.split()[:4]
        assert used["shared"] <= SHARED_LIMIT, name
        assert used["registers"] <= 255, name
        computes = any(word in kernel for word in PRODUCTS) and "combine" not in kernel
        assert (used["tensor_core_products"] > 0) == (computes and dtype != "float32"), name
        assert used["spills"] <= MORE_SPILLS_ALLOWED.get(f"{kernel} {arch}", SPILLS_ALLOWED), name


def test_nothing_takes_more_than_the_table_says(tmp_path):
    names = [
        next(n for n in TABLE if n.split()[2:4] == start.split() and "bfloat16" in n) for start in COMPILED
    ]
    (tmp_path / "names.json").write_text(json.dumps(names))
    command = [sys.executable, "-m", "bench.triton_resources", "--names", tmp_path / "names.json"]
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
