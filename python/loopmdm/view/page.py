"""One HTML file that plays a sampling run back: its data, style and script are inside, nothing is fetched."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from loopmdm.printable import printable
from loopmdm.sampling import StepEvent
from loopmdm.view.predictions import LoopPredictions
from loopmdm.view.symbols import BoardSymbols, Symbols
from loopmdm_kernels.files import write_file

_DIGITS = 3  # of probabilities
_PLACEHOLDER = re.compile(r"@(TITLE|STYLE|DATA|SCRIPT)@")


def page(
    canvas: Tensor,
    mask_token_id: int,
    history: Sequence[StepEvent],
    symbols: Symbols,
    *,
    lengths: Sequence[int] | None = None,
    title: str,
    titles: Sequence[str],
    facts: Mapping[str, str],
    predictions: Iterable[LoopPredictions] = (),
) -> str:
    """The page as text.

    Args:
        canvas: [B, L], the tokens before the first step.
        mask_token_id: the token that stands for "to be filled in".
        history: `SampleResult.history`.
        symbols: what tokens look like; `BoardSymbols` make it a page of boards.
        lengths: tokens of each sequence at last, `SampleResult.lengths`; default all of them.
        title: heading of the page.
        titles: names of the B sequences.
        facts: lines under the heading, name to text.
        predictions: what the model would predict after each number of loops, from `predict_loops`.
    """
    events = [_event(event) for event in history]
    predicted = {
        str(one.state): {"tokens": one.tokens.tolist(), "probs": _rounded(one.probabilities)}
        for one in predictions
    }
    rows: list[list[int]] = [[token for token in row if token >= 0] for row in canvas.tolist()]
    used = {token for row in rows for token in row}
    used.update(token for event in events for token in event["tokens"])
    used.update(token for one in predicted.values() for row in one["tokens"] for token in row)
    spec = symbols.spec if isinstance(symbols, BoardSymbols) else None
    data = {
        "title": title,
        "facts": list(facts.items()),
        "titles": list(titles),
        "mask": mask_token_id,
        "board": None if spec is None else [spec.box_rows, spec.box_cols],
        "canvas": rows,
        "lengths": [len(row) for row in rows] if lengths is None else list(lengths),
        "symbols": {str(token): _symbol(symbols, token) for token in sorted(used - {mask_token_id})},
        "separator": symbols.separator,
        "events": events,
        "predictions": predicted,
    }
    folder = files("loopmdm.view")
    parts = {
        "TITLE": html.escape(printable(title)),
        "STYLE": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "SCRIPT": folder.joinpath("page.js").read_text(encoding="utf-8"),
        "DATA": _json(data),
    }
    # In one pass, so that what is filled in is never searched for placeholders.
    frame = folder.joinpath("page.html").read_text(encoding="utf-8")
    return _PLACEHOLDER.sub(lambda match: parts[match[1]], frame)


def is_page(path: Path) -> bool:
    """Whether a file begins as those of `page` do."""
    head = files("loopmdm.view").joinpath("page.html").read_bytes().partition(b"@")[0]
    with path.open("rb") as file:
        return file.read(len(head)) == head


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Write a page, whole or not at all; into a FIFO or a device as it comes."""
    write_file(path, text)


def _event(event: StepEvent) -> dict[str, Any]:
    return {
        "step": event.step,
        "sequences": event.sequence.tolist(),
        "positions": event.positions.tolist(),
        "tokens": event.tokens.tolist(),
        "probs": _rounded(event.confidence),
        "loops": event.loops.tolist(),
    }


def _rounded(values: Tensor) -> Any:
    """Nested lists of a tensor [R] or [S, R]."""
    rows = values.tolist()
    if values.ndim == 1:
        return [round(value, _DIGITS) for value in rows]
    return [[round(value, _DIGITS) for value in row] for row in rows]


def _symbol(symbols: Symbols, token: int) -> str | list[int]:
    symbol = symbols.symbol(token)
    return list(symbol) if isinstance(symbol, bytes) else symbol


def _json(data: Any) -> str:
    """JSON that may stand inside a script element: no "<", so neither its end nor a comment can occur."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return (
        text.replace("\x7f", "\\u007f")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )
