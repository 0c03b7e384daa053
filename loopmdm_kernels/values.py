"""Plain values as users write them: whole numbers and numbers of any type, and one name of several."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable
from typing import Any

_CLOSE = 0.65  # of SequenceMatcher's ratio: two slips in a word of five letters are too many


def whole(value: Any) -> int | None:
    """A whole number of any type, numpy's too, as one of Python's; None for all else, also True and False."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def real(value: Any) -> float | None:
    """A number of any type, numpy's too, as one of Python's; None for all else, also True and False."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def meant(got: Any, accepted: Iterable[str]) -> str:
    """`; did you mean 'confidence'?` where a word is close to an accepted one, else nothing."""
    if not isinstance(got, str):
        return ""
    names = {name.lower().lstrip("-"): name for name in accepted}  # the dashes of options make all alike
    close = difflib.get_close_matches(got.lower().lstrip("-"), names, n=1, cutoff=_CLOSE)
    return f"; did you mean {names[close[0]]!r}?" if close else ""
