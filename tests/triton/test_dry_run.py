"""The scripts that need a GPU, on the CPU: every path, on tiny tensors, in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def dry_run(module, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    command = [sys.executable, "-W", "ignore", "-m", module, "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_path_of_the_gpu_script(tmp_path):
    dry_run("bench.gpu", "--out", tmp_path / "gpu.json")
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(result["checks"].values()) == {"right", "the small cases ran, without compute-sanitizer"}
    assert len(result["checks"]) > 25
    timed = {name for name, figures in result["figures"].items() if "ms" in figures}
    assert {name.split()[0] for name in timed} == {
        "looped_blocks",
        "attention",
        "sample_rows",
        "masked_cross_entropy",
        "sampling",
    }
    for name in ("sampling", "denoising step"):
        (times,) = (value for key, value in result["figures"][name].items() if key.startswith("ms"))
        assert {"ours", "ours, graphs"} <= set(times)
    overhead = result["figures"]["launch overhead"]
    assert overhead["launches a call"] == 11 and overhead["us a launch"] > 0
    for name in timed:
        assert all(value > 0 for value in result["figures"][name]["ms"].values())
