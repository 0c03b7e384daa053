"""A wheel builds in isolation and holds everything a user needs."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from loopmdm_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_installed_metadata():
    from importlib import metadata

    try:
        distribution = metadata.distribution("loopmdm-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("run from the source tree without an installation")
    assert distribution.version == __version__
    assert any(entry.name == "loopmdm" for entry in distribution.entry_points)


@pytest.mark.slow
def test_wheel(tmp_path):
    """As from a clean clone: source distribution, wheel without a network, its files, and what it does."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    source = tmp_path / "source"
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    script = [sys.executable, source / "tests/build/wheels.py"]
    subprocess.run([*script, "build", "--into", tmp_path / "dist"], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith(f"loopmdm_kernels-{__version__}-cp")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert not [r for r in metadata.get_all("Requires-Dist") if r.startswith("triton") and "extra" not in r]
    tried = subprocess.run(
        [*script, "try", wheel, "--borrow"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"loopmdm-kernels {__version__}, Python" in tried.stdout and "sample of sudoku9" in tried.stdout

    # What it must hold is no empty list, and what it must not hold is found.
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tests/stray.py", "")
    checked = subprocess.run([*script, "check", wheel], capture_output=True, text=True)
    assert checked.returncode != 0 and "not expected ['tests/stray.py']" in checked.stderr


def test_what_a_wheel_must_hold():
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "tests/build/wheels.py")
    wheels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheels)
    expected = set(wheels.expected())
    assert {
        "loopmdm_kernels/py.typed",
        "loopmdm_kernels/schedule/measured.json",
        "loopmdm_kernels/csrc/common/philox.h",
        "loopmdm_kernels/csrc/cuda/head/masked_cross_entropy_sm90.cu",
        "loopmdm/hf/model.py",
        "loopmdm/checkpoints/sudoku9/model.safetensors",
        "loopmdm/docs/glossary.md",
        "loopmdm/view/page.html",
    } <= expected
    assert not [name for name in expected if "/cpu/" in name and not name.endswith(".py")]
    assert {"pybind11", "cmake", "ninja", "setuptools"} <= {
        re.split("[^a-z0-9]", t)[0] for t in wheels.tools()
    }


def test_cubins_are_compiled_for_gpus_that_exist(tmp_path):
    """LOOPMDM_BUILD_CUDA reaches the compiler of the package that is being built."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "LOOPMDM_BUILD_CUDA": "8.0 7.5"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "argument --capability: the kernels need a GPU of compute capability 8.0 or later" in done.stderr
