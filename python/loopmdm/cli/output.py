"""What commands print: results on standard output, everything about the way there on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loopmdm import terminal
from loopmdm.printable import printable_lines
from loopmdm.runs.options import UsageError
from loopmdm_kernels.files import check_target


def print_json(document: dict[str, Any]) -> None:
    """The one JSON document of a command; what is not finite becomes null.

    Characters are written as escapes of JSON, which mean the same, where there are some that standard output
    does not have or that a terminal would act on.
    """
    finite = _finite(document)
    text = json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False)
    if not text.replace("\n", "").isprintable() or not terminal.has_encoding_for(text):
        text = json.dumps(finite, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
    print(text)


def show(text: str) -> None:
    """Lines of a result, with what a terminal would act on made visible."""
    print(printable_lines(text))


def writable(option: str, path: Path) -> None:
    """Complain about a path that cannot be written before the work, not after it."""
    try:
        check_target(path)
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path}: {error.strerror}") from error


def has_color() -> bool:
    """Whether standard output shows colours (a terminal, and NO_COLOR is not set)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "right") -> None:
    """A table with a line under the heading; the first column is left, the others as `align` says."""
    lines = [tuple(terminal.encodable(printable_lines(cell)) for cell in row) for row in (columns, *rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, tuple(terminal.encodable("─") * width for width in widths))
    for first, *others in lines:
        aligned = [
            cell.rjust(width) if align == "right" else cell.ljust(width)
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        print("  ".join([first.ljust(widths[0]), *aligned]).rstrip())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
