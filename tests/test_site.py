"""The site of the documents, as far as it can be checked without mkdocs: `make docs` builds it, strictly."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
NAV = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", CONFIG, re.MULTILINE)
PAGES = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
NAMES = [
    name
    for path in sorted(ROOT.glob("docs/api/*.md"))
    for name in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_document_has_one_place_in_the_site(hooks):
    assert sorted(NAV) == sorted({*PAGES, *hooks.PAGES.values()})


def test_every_document_of_the_top_is_a_page(hooks):
    tracked = {path.name for path in ROOT.glob("*.md")}
    assert tracked >= hooks.PAGES.keys() and {"README.md", "CONTRIBUTING.md"} <= hooks.PAGES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_interfaces_exist_and_are_explained(name):
    assert pkgutil.resolve_name(name).__doc__


@pytest.mark.parametrize(
    ("origin", "link", "rewritten"),
    [
        ("README.md", "docs/ops.md", "ops.md"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("README.md", "docs/kernels/machinery.md", "kernels/machinery.md"),
        ("README.md", "https://arxiv.org/abs/2605.26106", "https://arxiv.org/abs/2605.26106"),
        ("docs/backends.md", "../README.md#what-runs-where", "index.md#what-runs-where"),
        ("docs/backends.md", "gpu.md", "gpu.md"),
        ("docs/kernels/attention.md", "../results.md", "../results.md"),
        (
            "docs/tutorials/add_a_backend.md",
            "../../CONTRIBUTING.md#a-backend",
            "../contributing.md#a-backend",
        ),
        ("docs/studies.md", "#schedules", "#schedules"),
    ],
)
def test_links_of_the_tree_are_links_of_the_site(hooks, origin, link, rewritten):
    assert hooks.rewritten(f"see [it]({link}).", origin) == f"see [it]({rewritten})."


def test_links_lead_to_what_the_site_has(hooks):
    """What stands elsewhere in the tree is named, not linked: the site does not have it."""
    count = 0
    for name in ({f"docs/{page}" for page in PAGES}) | hooks.PAGES.keys():
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(
            r"\]\(([^)\s:#]+)(?:#[^)\s]*)?\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        ):
            target = (ROOT / name).parent.joinpath(link).resolve().relative_to(ROOT).as_posix()
            count += 1
            assert target.startswith("docs/") or target in hooks.PAGES, f"{name}: {link}"
    assert count > 100
