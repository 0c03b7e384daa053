"""The page holds exactly the data of the run, and nothing in the data can leave its place."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm import ComputePlan, LoopMDM, sample
from loopmdm.data.sudoku import NINE
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.view import BoardSymbols, Symbols, TextSymbols, page, write_page
from loopmdm.view.predictions import predict_loops

from .conftest import event


class Scripts(HTMLParser):
    """The contents of the script elements, as a browser's parser finds them, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.titles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)
        if self.tags and self.tags[-1] in ("title", "h1") and data.strip():
            self.titles.append(data)


def data_of(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Scripts(text).scripts[0])
    return document


def test_the_data_is_the_history(model: LoopMDM) -> None:
    canvas = torch.full((2, 14), 257)
    canvas[0, :2] = torch.tensor(list(b"ab"))
    result = sample(model, infill=canvas, remask="cap", steps=20, seed=2, history=True, progress=False)
    assert result.history is not None
    assert any(bool((one.tokens == 257).any()) for one in result.history)
    predictions = predict_loops(
        model, canvas, result.history, ComputePlan.constant(2), result.num_steps, most_states=5
    )
    text = page(
        canvas,
        257,
        result.history,
        TextSymbols(ByteTokenizer()),
        title="t",
        titles=["one", "two"],
        facts={"seed": "2"},
        predictions=predictions,
    )
    data = data_of(text)
    assert (data["title"], data["titles"], data["facts"]) == ("t", ["one", "two"], [["seed", "2"]])
    assert data["canvas"] == canvas.tolist() and data["mask"] == 257 and data["board"] is None
    assert data["lengths"] == [14, 14]
    assert len(data["events"]) == len(result.history)
    for got, one in zip(data["events"], result.history, strict=True):
        assert got["step"] == one.step and got["tokens"] == one.tokens.tolist()
        assert got["sequences"] == one.sequence.tolist() and got["positions"] == one.positions.tolist()
        assert got["loops"] == one.loops.tolist()
        assert got["probs"] == [round(p, 3) for p in one.confidence.tolist()]
    assert sorted(map(int, data["predictions"])) == [one.state for one in predictions]
    for one in predictions:
        got = data["predictions"][str(one.state)]
        assert got["tokens"] == one.tokens.tolist()
        assert got["probs"] == [[round(p, 3) for p in row] for row in one.probabilities.tolist()]
    assert data["symbols"]["97"] == [97] and "257" not in data["symbols"]
    replayed = canvas.tolist()
    for got in data["events"]:
        for sequence, position, token in zip(got["sequences"], got["positions"], got["tokens"], strict=True):
            replayed[sequence][position] = token
    assert replayed == result.tokens.tolist()


class Hostile(Symbols):
    """Tokens that try to break out of the page."""

    words = (
        "</script><script>alert(1)</script>",
        "<!--",
        "<script>",
        "&lt;",
        "\u2028\u202e",
        "@DATA@@SCRIPT@",
        '"',
    )

    def symbol(self, token: int) -> str | bytes:
        return self.words[token]


def test_nothing_breaks_out() -> None:
    number = len(Hostile.words)
    canvas = torch.tensor([[*range(number), number]])
    history = [event(0, (0, number, 0, 0.5, 1))]
    hostile = "</title></script><img src=x onerror=alert(1)>@STYLE@"
    text = page(canvas, number, history, Hostile(), title=hostile, titles=[hostile], facts={hostile: hostile})
    parsed = Scripts(text)
    assert len(parsed.scripts) == 2 and "img" not in parsed.tags
    assert parsed.titles == [hostile, hostile]
    data = json.loads(parsed.scripts[0])
    assert [data["symbols"][str(i)] for i in range(number)] == list(Hostile.words)
    assert data["facts"] == [[hostile, hostile]] and data["titles"] == [hostile]
    assert parsed.scripts[1].strip().endswith("choose(Math.max(0, data.canvas[0].indexOf(data.mask)));")
    assert "innerHTML" not in text


def test_the_page_fetches_nothing() -> None:
    text = page(torch.tensor([[9]]), 9, [], BoardSymbols(NINE), title="t", titles=["a"], facts={})
    parsed = Scripts(text)
    assert not {name for name, _ in parsed.attributes} & {"src", "href"} and "link" not in parsed.tags
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", text)
    assert "default-src 'none'" in text
    assert data_of(text)["board"] == [3, 3]


def test_padding_and_ends() -> None:
    canvas = torch.tensor([[9, 9, 9], [9, 9, -1]])
    history = [event(0, (0, 0, 1, 1.0, 1), (1, 0, 2, 1.0, 1))]
    text = page(
        canvas, 9, history, BoardSymbols(NINE), lengths=[1, 2], title="t", titles=["a", "b"], facts={}
    )
    data = data_of(text)
    assert data["canvas"] == [[9, 9, 9], [9, 9]] and data["lengths"] == [1, 2]
    assert data["symbols"] == {"1": "2", "2": "3"}


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_page(tmp_path / "new" / "page.html", "é")
    assert (tmp_path / "new" / "page.html").read_bytes() == "é".encode()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="no partial file is left"):
        write_page(tmp_path / "folder", "text")
    with pytest.raises(UnicodeEncodeError):
        write_page(tmp_path / "page.html", "\ud800")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
