"""The generated kernel: the bits of the tree under another name, in the form that `kernels` loads."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]
IN_CHILD = Path(__file__).with_name("in_child.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hub") / "kernel"
    subprocess.run(
        [sys.executable, "-m", "examples.hub", made, "--repo-id", "some/loopmdm-triton"], cwd=ROOT, check=True
    )
    return made


def in_child(what, folder):
    path = os.pathsep.join((f"{ROOT}", f"{ROOT}/python", os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(IN_CHILD), what, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]


def test_ops_have_the_bits_of_the_tree(folder):
    in_child("ops", folder)


def test_benchmarks_time_what_they_verify(folder):
    in_child("benchmarks", folder)


@pytest.mark.skipif(find_spec("kernels") is None, reason="the package kernels is not installed (extra hub)")
def test_kernelize_replaces_layers_of_a_model(folder):
    in_child("kernelize", folder)


def test_sources_import_nothing_but_torch_with_what_it_needs_and_triton(folder):
    """The rules of the Hub: imports of the kernel's own modules are relative."""
    sources = list((folder / "build/torch-cuda").rglob("*.py"))
    assert len(sources) > 40
    for path in sources:
        text = path.read_text(encoding="utf-8")
        absolute = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        assert absolute <= {*sys.stdlib_module_names, "torch", "triton", "typing_extensions"}, path


def test_metadata_names_every_file(folder):
    variant = folder / "build/torch-cuda"
    metadata = json.loads((variant / "metadata.json").read_text())
    found = {path.relative_to(variant).as_posix() for path in variant.rglob("*.py")}
    assert metadata["digest"]["files"].keys() == found
    for name, digest in metadata["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256((variant / name).read_bytes()).digest(), name
    assert metadata["id"].isidentifier() and metadata["id"] in (variant / "_ops.py").read_text()
    built = {path.relative_to(variant).as_posix(): path.read_bytes() for path in variant.rglob("*.py")}
    del built["_ops.py"]  # which kernel-builder writes
    source = folder / "torch-ext/loopmdm_triton"
    assert {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.*")} == built
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    toml = tomllib.loads((folder / "build.toml").read_text())
    assert toml["general"]["name"].replace("-", "_") == source.name
    assert toml["torch-noarch"] == {} and toml["general"]["hub"] == {"repo-id": "some/loopmdm-triton"}
    assert toml["general"]["backends"] == [metadata["backend"]["type"]]


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("kept")
    done = subprocess.run(
        [sys.executable, "-m", "examples.hub", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
