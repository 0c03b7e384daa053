"""Plain values as users write them: whole numbers and numbers of any type, and one name of several."""

from __future__ import annotations

import difflib
import json
import math
import numbers
from collections.abc import Iterable
from typing import Any

_CLOSE = 0.65  # of SequenceMatcher's ratio: two slips in a word of five letters are too many


def whole(value: Any) -> int | None:
    """A whole number of any type, numpy's too, as one of Python's; None for all else, also True and False."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def integer(name: str, value: Any) -> int:
    """A whole number of any type as one of Python's, or a TypeError that names it."""
    number = whole(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    return number


def positive(name: str, value: Any) -> int:
    """A whole number of at least 1, or an error that names it."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise the ValueError of a number below the least that is accepted, or of NaN."""
    if not value >= least:
        raise ValueError(f"{name} is {value}; accepted: at least {least}")


def real(value: Any) -> float | None:
    """A number of any type, numpy's too, as one of Python's; None for all else, also True and False.

    A whole number stays one where it fits 64 bits; beyond it is a float, and infinite beyond those.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    number = whole(value)
    if number is not None and -(2**63) <= number < 2**63:
        return number
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def meant(got: Any, accepted: Iterable[str]) -> str:
    """`; did you mean 'confidence'?` where a word is close to an accepted one, else nothing."""
    if not isinstance(got, str):
        return ""
    names = {name.lower().lstrip("-"): name for name in accepted}  # the dashes of options make all alike
    close = difflib.get_close_matches(got.lower().lstrip("-"), names, n=1, cutoff=_CLOSE)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def parse_json(text: str | bytes) -> Any:
    """The JSON value of a text; whatever is wrong with it is a ValueError, deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
