"""Standard output and standard error, which may be closed, full, gone, or unable to show a character.

Results go to standard output and are never lost for the sake of a character: what its encoding lacks becomes
the nearest ASCII, else "?". Messages go to standard error; that they cannot be shown stops nothing.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from loopmdm.printable import printable_lines

if TYPE_CHECKING:
    from rich.console import Console

_ASCII = {
    **{"─": "-", "━": "-", "═": "=", "│": "|", "╸": "-", "╺": "-", "█": "#", "·": ".", "•": "*", "…": "..."},
    **{"±": "+-", "−": "-", "–": "-", "—": "-", "×": "x", "→": "->", "≤": "<=", "≥": ">=", "√": "sqrt"},
    **{"⟨": "<", "⟩": ">", "↵": "\\n", "⇥": "\\t", "␣": "_", "∎": ".", "∅": "0", "²": "2", "Δ": "D"},
    **{"‘": "'", "’": "'", "“": '"', "”": '"'},
}
_REPLACE, _ESCAPE = "loopmdm.replace", "loopmdm.escape"
# What Python chooses by itself; anything else a user has asked for.
_DEFAULT_ERRORS = ("strict", "surrogateescape", "backslashreplace")


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("unicode_escape").decode() for c in found), error.end


codecs.register_error(_REPLACE, _replace)
codecs.register_error(_ESCAPE, _escape)


def prepare() -> None:
    """Make the standard streams of a command usable, whatever they were when it was started."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        _open_closed_descriptors()
        sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (for the life of the process)
        sys.stdout, sys.stderr = sys.stdout or _null(), sys.stderr or _null()
    for stream, errors in ((sys.stdout, _REPLACE), (sys.stderr, _ESCAPE)):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _DEFAULT_ERRORS:
            stream.reconfigure(errors=errors)


def _open_closed_descriptors() -> None:
    """So that no file opened later gets the number of standard output, and with it what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def finish(stream: TextIO) -> OSError | None:
    """Write out what is buffered; if that fails, drop it, since it would fail again when Python exits."""
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return error
    except ValueError:  # closed
        return None
    return None


def encodable(text: str) -> str:
    """The text as standard output will show it."""
    encoding, errors = sys.stdout.encoding or "utf-8", sys.stdout.errors or "strict"
    return text.encode(encoding, _REPLACE if errors == "strict" else errors).decode(encoding, "replace")


def has_encoding_for(text: str) -> bool:
    """Whether standard output holds every character of the text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def say(text: str) -> None:
    """A line on standard error, if it can be written."""
    print(text, file=standard_error(), flush=True)


def note(text: str) -> None:
    """A line about the way to the result."""
    say(printable_lines(text))


def note_waiting(path: Path) -> None:
    """Say so where reading a path waits for another process."""
    if path.is_fifo():
        note(f"{path} is a pipe: waiting for what is written to it")


def console() -> Console:
    """rich's console on standard error; whoever watches may leave."""
    from rich.console import Console

    return Console(file=standard_error())


def standard_error() -> TextIO:
    """Standard error as it is now, on which a write that fails is no error."""
    return cast(TextIO, _Tolerant(sys.stderr))


def _null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


class _Tolerant(io.TextIOBase):
    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None:
            # ValueError: closed, or a character that the stream does not have
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no standard error")
        return self._stream.fileno()
