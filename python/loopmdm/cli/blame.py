"""Which option an error is about: the library names its arguments and files, people know what they wrote."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterator, Sequence

_SHORTEST = 3  # of values that are looked for in a message


def option_meant(
    parser: argparse.ArgumentParser, words: Sequence[str], values: argparse.Namespace, message: str
) -> str | None:
    """The option or argument that a message speaks of without naming it; None where it is not clear.

    The message begins with the parameter that the option sets, or has the name of one that is no plain word,
    or it has the path that is given.

    Args:
        parser: of the options.
        words: the command line.
        values: what was read from it.
        message: of the error.
    """
    if re.search(r"(?<!\S)--[a-z]", message):  # it names one
        return None
    given = list(_given(parser, words))
    for option, action, _ in given:
        if re.search(rf"(^|: ){action.dest}( must| is| and|:)", message):
            return option
    for option, action, _ in given:
        if "_" in action.dest and re.search(rf"(?<![\w/.'-]){action.dest}(?![\w/.'-])", message):
            return option
    for option, action, value in given:
        if action.choices is None and _is_named(value, message):
            return option
    for action in parser._actions:
        word = getattr(values, action.dest, None)
        if not action.option_strings and isinstance(word, str) and _is_named(word, message):
            return str(action.metavar)
    return None


def _given(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> Iterator[tuple[str, argparse.Action, str]]:
    """The options of a command line with each of their values, and "" for one without."""
    by_name = {option: action for action in parser._actions for option in action.option_strings}
    option, left = "", 0.0  # that may have more values, and how many
    for word in words:
        name, equals, value = word.partition("=")
        if name in by_name:
            option, nargs = name, by_name[name].nargs
            left = 1 if nargs is None else nargs if isinstance(nargs, int) else math.inf
            left -= bool(equals)
            yield option, by_name[name], value
        elif left > 0:
            left -= 1
            yield option, by_name[option], word


def _is_named(value: str, message: str) -> bool:
    """Whether a message has a path: from the root, with a folder, in quotes or at its beginning."""
    if len(value) < _SHORTEST:
        return False
    whole = re.escape(os.path.abspath(value))
    own = re.escape(value) if os.sep in value else rf"(?:^|(?<=')){re.escape(value)}"
    return re.search(rf"(?<![\w/.-])(?:{whole}|{own})(?![\w.-])", message) is not None
