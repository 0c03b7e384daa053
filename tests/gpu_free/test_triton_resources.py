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
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
SPILLS_ALLOWED = 0
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


def arch(name):
    return next(word for word in name.split() if word.startswith("sm_"))


def kernel(name):
    return next(word for word in name.split() if word.endswith("_kernel"))


@pytest.mark.parametrize("name", TABLE)
def test_limits(name):
    used = TABLE[name]
    assert used["shared"] <= SHARED_LIMIT[arch(name)]
    assert used["registers"] <= 255
    narrow = "float32" not in name.split()[1]
    computes = any(word in kernel(name) for word in PRODUCTS) and "combine" not in name
    assert (used["tensor_core_products"] > 0) == (narrow and computes)
    if arch(name) == "sm_90" and narrow:
        assert used["spills"] <= SPILLS_ALLOWED


def test_nothing_takes_more_than_the_table_says(tmp_path):
    names = [next(n for n in TABLE if n.split()[2:4] == start.split()) for start in COMPILED]
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
