"""Runs a tutorial: its blocks of Python and of commands in order, each beside the output that it shows.

python -m tests.tutorials docs/tutorials/NAME.md ...    # write the real output where another is shown

A block of `python` shares its names with those before it; a line of `sh` is a command of `loopmdm`. What they
print on standard output stands in the block of `text` behind them. There "…" stands for anything, in a line
or as a line for any number of them, and numbers with a point may differ as they do between processors.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loopmdm.cli import main as loopmdm

ANY = "…"
RELATIVE, ABSOLUTE = 0.1, 0.02  # between instruction sets, of a model that was trained for seconds
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


class Step(NamedTuple):
    """A block that is run, and what it is said to print."""

    language: str
    code: str
    shown: str
    place: slice  # of `shown` in the text of the page; empty where it shows none


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    for match in _BLOCK.finditer(text):
        language, content = match.groups()
        if language in ("python", "sh"):
            found.append(Step(language, content, "", slice(match.end(), match.end())))
        elif language == "text" and found:
            found[-1] = found[-1]._replace(shown=content, place=slice(match.start(), match.end()))
    return found


def run(page: Path, folder: Path) -> Iterator[tuple[Step, str]]:
    """Each step of the page and what it printed, in `folder`."""
    names: dict[str, Any] = {"__name__": "tutorial"}
    with contextlib.chdir(folder) if sys.version_info >= (3, 11) else _chdir(folder):
        for step in steps(page.read_text(encoding="utf-8")):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if step.language == "python":
                    exec(compile(step.code, page.name, "exec"), names)
                else:
                    _run_commands(step.code)
            yield step, printed.getvalue()


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _run_commands(code: str) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "loopmdm", line
        status = loopmdm(arguments)
        assert status == 0, f"{line}: exit status {status}"


def agree(shown: str, printed: str) -> bool:
    """Whether the page shows what was printed."""
    expected, got = ([_words(line) for line in text.splitlines()] for text in (shown, printed))
    return _lines_agree(expected, got)


def _words(line: str) -> str:
    """Without the widths of columns."""
    return re.sub("─+", "─", " ".join(line.split()))


def _lines_agree(expected: list[str], got: list[str]) -> bool:
    if not expected:
        return not got
    if expected[0] == ANY:
        return any(_lines_agree(expected[1:], got[skipped:]) for skipped in range(len(got) + 1))
    return bool(got) and _line_agrees(expected[0], got[0]) and _lines_agree(expected[1:], got[1:])


def _line_agrees(expected: str, got: str) -> bool:
    pattern = "".join(
        ".*?" if part == ANY else f"({_NUMBER.pattern})" if _NUMBER.fullmatch(part) else re.escape(part)
        for part in re.split(f"({ANY}|{_NUMBER.pattern})", expected)
    )
    found = re.fullmatch(pattern, got)
    numbers = _NUMBER.findall(expected)
    return found is not None and all(map(_close, map(float, numbers), map(float, found.groups())))


def _close(expected: float, got: float) -> bool:
    return abs(expected - got) <= ABSOLUTE + RELATIVE * abs(expected)


def rewritten(page: Path, folder: Path) -> str:
    """The page with what its steps print."""
    text = page.read_text(encoding="utf-8")
    changes = [
        (step.place, f"```text\n{printed}```\n" if step.shown else f"\n```text\n{printed}```\n")
        for step, printed in run(page, folder)
        if not agree(step.shown, printed)
    ]
    for place, new in reversed(changes):
        text = text[: place.start] + new + text[place.stop :]
    return text


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]]:
        with tempfile.TemporaryDirectory() as scratch:
            new_text = rewritten(path, Path(scratch))
        path.write_text(new_text, encoding="utf-8")
