"""A wheel builds in isolation and holds everything a user needs."""

import os
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
    """Builds from a copy of the tracked files, as from a clean clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    source = tmp_path / "source"
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", str(tmp_path / "wheels")]
    subprocess.run(command, cwd=source, env=environment, check=True)

    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name.startswith(f"loopmdm_kernels-{__version__}-cp")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"loopmdm_kernels-{__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert "loopmdm = loopmdm.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    expected = {
        "loopmdm_kernels/__init__.py",
        "loopmdm_kernels/py.typed",
        "loopmdm_kernels/schedule/measured.json",
        "loopmdm_kernels/reference/sample_rows.py",
        "loopmdm_kernels/csrc/common/philox.h",
        "loopmdm/__init__.py",
        "loopmdm/py.typed",
        *(f"loopmdm/docs/{name}.md" for name in ("glossary", "inputs", "notation")),
        *(f"loopmdm/view/page.{kind}" for kind in ("html", "css", "js")),
        f"{info}/licenses/LICENSE",
    }
    shipped = {"python/loopmdm/checkpoints": "loopmdm/checkpoints", "csrc/cuda": "loopmdm_kernels/csrc/cuda"}
    for folder, package in shipped.items():
        for path in filter(Path.is_file, (source / folder).rglob("*")):
            expected.add(f"{package}/{path.relative_to(source / folder)}")
    assert expected <= names, expected - names
    for module in ("loopmdm_kernels/_C.", "loopmdm/_sudoku."):
        assert [name for name in names if name.startswith(module) and name.endswith(".so")], module
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc", "python"))]
    assert not [r for r in metadata.get_all("Requires-Dist") if r.startswith("triton") and "extra" not in r]


def test_cubins_are_compiled_for_gpus_that_exist(tmp_path):
    """LOOPMDM_BUILD_CUDA reaches the compiler of the package that is being built."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "LOOPMDM_BUILD_CUDA": "8.0 7.5"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "argument --capability: the kernels need a GPU of compute capability 8.0 or later" in done.stderr
