"""The script that needs a GPU, on the CPU: every path, on tiny tensors, Triton in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, gpu_hopper

ROOT = Path(__file__).parents[2]
TRITON_CHECKS = {"triton looped_blocks": 19, "triton masked_cross_entropy": 6, "triton draws": 1}


def test_every_path_of_the_gpu_script(tmp_path):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/python"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu", "--dry-run", "--minutes", "60"]
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    (log,) = tmp_path.glob("*-log.txt")
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    (path,) = tmp_path.glob("*-gpu.json")
    result = json.loads(path.read_text())
    assert list(result["phases"]) == [name for name, phase in gpu.PHASES.items() if phase.dry]
    figures = {name: phase["figures"] for name, phase in result["phases"].items()}
    for name, phase in result["phases"].items():
        assert not {"failed", "left out"} & set(phase) and figures[name], (name, phase)
    verdicts = {name: list(found.values()).count("right") for name, found in figures.items()}
    assert verdicts.items() >= TRITON_CHECKS.items()
    assert all(verdicts[name] > 1 for name in ("same bits", "triton fp8", *gpu.LAUNCHES))
    timed = ("launch overhead", "denoising step", "sampling", "environment")
    for name in figures.keys() - set(timed):
        assert set(figures[name].values()) <= {None, "right", 1.0}, (name, figures[name])
    assert figures["T128"].keys() == {"cuda", "cuda without window", "triton", "eager", "torch.compile"}
    assert figures["masked_cross_entropy"].keys() > {"cuda", "triton", "compiled", "compiled, all rows"}
    for name in ("sampling", "denoising step"):
        assert all(time["ms"] > 0 for time in figures[name].values())
        assert {"ours", "ours, graphs"} <= set(figures[name])
    assert figures["launch overhead"]["launches a call"] == 11
    assert set(result["targets"].values()) == {None} and result["ceilings"] == {}
    assert result["beside the model"] == {"128 tokens": {}}


def test_what_is_asked_of_a_gpu():
    """What comes first, and that other scripts and limits fit."""
    quick = [name for name, phase in gpu.PHASES.items() if phase.quick]
    assert quick[:4] == ["environment", "contract", "first looped_blocks", "first cluster"]
    assert list(gpu.PHASES)[: len(quick)] == quick, "the rest comes behind"
    assert gpu_hopper.PHASES.items() <= gpu.PHASES.items()
    assert all(phase.seconds <= 240 for phase in gpu.PHASES.values())
    for _, arguments in gpu.TESTS.values():
        for argument in arguments:
            assert (ROOT / argument.removeprefix("--ignore=")).exists() or argument in (
                "-m",
                "gpu",
                "not gpu",
            )
