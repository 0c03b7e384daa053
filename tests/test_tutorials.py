"""The tutorials: what they run works, in order, and prints what they show."""

from pathlib import Path

import pytest
import torch

from loopmdm_kernels import backends
from tests import tutorials

PAGES = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("[a-z]*.md"))
PAGES = [page for page in PAGES if page.name != "index.md"]


@pytest.fixture
def registry(monkeypatch):
    """What the page on backends adds to."""
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS)
    for name in ("_KERNELS", "_DEVICE_OF"):
        monkeypatch.setattr(backends, name, dict(getattr(backends, name)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial(page, tmp_path, registry):
    with torch.random.fork_rng():
        for step, printed in tutorials.run(page, tmp_path):
            assert tutorials.agree(step.shown, printed), (
                f"{step.code}\nprinted:\n{printed}\nshown:\n{step.shown}"
            )


def test_every_tutorial_is_listed():
    index = (PAGES[0].parent / "index.md").read_text(encoding="utf-8")
    assert len(PAGES) == 7
    assert all(f"]({page.name})" in index for page in PAGES)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.00 b\n", "a  1.05 b\n", True),
        ("a 1.00 b\n", "a 1.50 b\n", False),
        ("a 3 b\n", "a 4 b\n", False),
        ("loss … s\n", "loss 3.2, 4 s\n", True),
        ("first\n…\nlast\n", "first\nx\ny\nlast\n", True),
        ("first\n…\nlast\n", "first\nx\ny\n", False),
        ("", "something\n", False),
        ("something\n", "", False),
    ],
)
def test_what_counts_as_shown(shown, printed, same):
    assert tutorials.agree(shown, printed) is same
