"""Files that other services read: workflows, templates, citation. Each says what the project says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loopmdm_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[2]
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/workflows/*.yml")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def steps(name):
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def test_workflows_run_what_is_there():
    assert set(WORKFLOWS) == {"docs", "test", "wheels"}
    makefile = (ROOT / "Makefile").read_text()
    for name in WORKFLOWS:
        for step in steps(name):
            run = step.get("run", "")
            for target in re.findall(r"\bmake ([\w-]+)", run):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), run
            for path in re.findall(r"\btests/\S+", run):
                assert (ROOT / path).exists(), run


def test_workflows_and_wheels_have_the_pythons_of_the_project():
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    matrix = WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["include"]
    pythons = [entry["python"] for entry in matrix]
    assert pythons[0] == least
    built = [name.removeprefix("cp3").removesuffix("-*") for name in PROJECT["tool"]["cibuildwheel"]["build"]]
    assert built[0] == least.removeprefix("3.") and built == [str(n) for n in range(10, int(built[-1]) + 1)]
    assert pythons[-1] == f"3.{built[-1]}"
    (torch,) = (name for name in PROJECT["project"]["dependencies"] if name.startswith("torch"))
    assert matrix[0]["torch"] == f"torch=={torch.removeprefix('torch>=')}.*"
    assert f"TORCH ?= {matrix[1]['torch']}\n" in (ROOT / "Makefile").read_text()


def test_issue_templates_ask_for_the_doctor():
    for name in ("bug", "speed"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        asked = [field for field in form["body"] if "doctor --json" in field["attributes"]["label"]]
        assert len(asked) == 1 and asked[0]["validations"]["required"]


def test_citation_and_changes_name_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == __version__
    assert citation["title"] == PROJECT["project"]["name"]
    assert citation["license"] == PROJECT["project"]["license"]
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


def test_source_distribution_has_what_is_tracked(tmp_path):
    """But for the files of this repository's own services."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (sources,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    missing = tracked - set(sources.read_text().splitlines())
    assert not {name for name in missing if not name.startswith((".ci/", ".github/", ".clang-", ".git"))}
