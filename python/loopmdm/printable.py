"""Text of files, paths and names as it may stand in a message."""

from __future__ import annotations

import reprlib

_LONGEST = 400
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = _LONGEST


def printable(text: object, *, longest: int = _LONGEST) -> str:
    """`text` on one line, cut at `longest` characters, with what a terminal would act on made visible.

    Control characters, marks that turn the direction of writing, lone surrogates and the like appear as
    Python escapes: a file must not be able to move the cursor, hide a part of a message or forge another.
    """
    value = str(text)
    if len(value) > longest:
        value = value[:longest] + "..."
    return value if value.isprintable() else "".join(map(_visible, value))


def shown(value: object) -> str:
    """The `repr` of a value out of a file, printable and short however large or nested the value is."""
    try:
        return printable(_BRIEF.repr(value))
    except ValueError:  # of more digits than Python prints
        return f"a {type(value).__name__} too long to print"


def printable_lines(text: str) -> str:
    """A whole message, in which line breaks are its own and everything else is treated as in `printable`."""
    return "\n".join("".join(map(_visible, line)) for line in text.split("\n"))


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
