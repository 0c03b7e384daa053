"""The page's script, run by node on a document of a few lines (skipped where there is no node)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm.data.sudoku import SIX
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.view import BoardSymbols, IdSymbols, TextSymbols, page

from .conftest import event

FOLDER = Path(page.__code__.co_filename).parent
DOCUMENT = (Path(__file__).parent / "document.js").read_text(encoding="utf-8")


def run(text: str, questions: str) -> Any:
    """What `questions`, JavaScript behind the page's, gives as JSON."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = (FOLDER / "page.js").read_text(encoding="utf-8").replace('"use strict";', "")
    program = f"{DOCUMENT}\n{script}\nprocess.stdout.write(JSON.stringify({questions}));"
    done = subprocess.run([node, "-e", program], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SOLVED = torch.tensor([int(digit) - 1 for digit in "123456456123231564564231312645645312"])


def boards(last: int = 5) -> str:
    """A board of which two cells are filled in, the second with token `last` (1 is right)."""
    canvas = SOLVED.clone()
    canvas[[0, 35]] = 6
    history = [event(0, (0, 0, 0, 0.9, 2)), event(1, (0, 35, last, 0.3, 1))]
    return page(canvas[None], 6, history, BoardSymbols(SIX), title="t", titles=["one"], facts={"order": "x"})


def test_the_verdict_of_a_board() -> None:
    states = "[0, 1, 2].map((s) => { setState(s); return at('verdict').textContent; })"
    assert run(boards(1), states) == ["2 cells open", "1 cell open", "solved"]
    wrong = run(boards(4), states)
    assert wrong[:2] == ["2 cells open", "1 cell open"]
    assert wrong[2].startswith("wrong: ") and wrong[2].endswith(
        "clash: a digit twice in a row, column or box"
    )
    struck = run(boards(4), "at('tokens').querySelectorAll('.clash').map((one) => one.dataset.position)")
    assert 35 in struck and f"wrong: {len(struck)} cells" in wrong[2]
    empty = torch.full((1, 36), 6)
    made = [event(0, *((0, i, int(token), 0.5, 1) for i, token in enumerate(SOLVED)))]
    text = page(empty, 6, made, BoardSymbols(SIX), title="t", titles=["one"], facts={})
    assert run(text, "at('verdict').textContent") == "a valid board"


def test_a_text_has_no_verdict_and_every_token_a_place() -> None:
    canvas = torch.tensor([list("a\nbé x".encode())])
    text = page(canvas, 257, [], TextSymbols(ByteTokenizer()), title="t", titles=["one"], facts={})
    places = "data.canvas[0].map((_, i) => { choose(i); return at('details').textContent; })"
    details = run(text, places)
    found = [re.search(r"in the text(line \d+, column \d+)", one)[1] for one in details]
    assert found == [
        *("line 1, column 1", "line 1, column 2", "line 2, column 1", "line 2, column 2"),
        *("line 2, column 2", "line 2, column 3", "line 2, column 4"),
    ]
    assert run(text, "at('verdict').textContent") == ""
    ids = page(torch.tensor([[12, 3, 4]]), 257, [], IdSymbols(), title="t", titles=["one"], facts={})
    assert "line 1, column 4" in run(ids, "(choose(1), at('details').textContent)")


def test_the_marks_are_explained() -> None:
    """One for each class that the style gives a look, in the words of the kind of page."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    looks = {"given", "masked", "fresh", "chosen", "unsure", "guess", "clash", "part"}
    assert all(re.search(rf"\.token\.{name}\b|\.token\.chosen", style) for name in looks)
    marks = "at('marks').all().filter((one) => one.className).map((one) => one.className.split(' ')[1])"
    assert run(boards(), marks) == ["given", "masked", "fresh", "chosen", "unsure", "clash"]
    words = run(boards(), "at('marks').textContent")
    assert "framed: changed by the step shown" in words
    assert "struck through: twice in its row, column or box" in words
    text = page(
        torch.tensor([[97, 98]]), 257, [], TextSymbols(ByteTokenizer()), title="t", titles=["a"], facts={}
    )
    assert run(text, marks) == ["given", "masked", "fresh", "chosen", "unsure", "part"]
    assert "struck" not in run(text, "at('marks').textContent")


def test_styles_for_paper_phones_and_the_dark() -> None:
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    assert "@media print" in style and "print-color-adjust: exact" in style.partition("@media print")[2]
    printed = style.partition("@media print")[2]
    assert "#play, #step, #loops" in printed
    # Which sequence it is and what its colours mean are printed, and the frame has the colour of its legend.
    assert "#sample" not in printed and "#color" not in printed and "appearance: none" in printed
    assert ".chosen" not in printed
    assert "@media (max-width: 30rem)" in style
    light, dark = re.findall(r"--accent: (#[0-9a-f]{6})", style)
    assert "accent-color: var(--accent)" in style

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    papers = re.findall(r"--paper: (#[0-9a-f]{6})", style)
    for accent, paper in ((light, papers[0]), (dark, papers[1])):
        bright, dim = sorted((luminance(accent), luminance(paper)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) > 4.5  # WCAG's contrast for text; 3 is asked of controls
