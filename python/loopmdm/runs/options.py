"""The values that options take, and what is said of those that do not fit."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MOST_THREADS = max(1024, os.cpu_count() or 1)  # OpenMP ends the process where it cannot start them
_MOST = 2**63 - 1  # of what tensors and files count


class UsageError(Exception):
    """Options that are each fine and do not go together, or values that only the library can judge."""


def blame(error: Exception, option: str | None) -> None:
    """Note which option an error is about, if that is known now and was not before."""
    if option is not None:
        error.__dict__.setdefault("option", option)


def option_of(error: Exception) -> str | None:
    """What `blame` has noted."""
    option: str | None = error.__dict__.get("option")
    return option


@contextmanager
def of_option(option: str | None) -> Iterator[None]:
    """Errors inside are about this option, unless one inside knows better."""
    try:
        yield
    except Exception as error:
        blame(error, option)
        raise


@contextmanager
def usage_errors(option: str | None = None) -> Iterator[None]:
    """Turns what the library says about a value, that of `option`, into an error of usage."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if getattr(error, "of_the_model", False):  # what it predicts is no fault of the options
            raise
        wrong = UsageError(str(error))
        blame(wrong, option_of(error) or option)
        raise wrong from error


@contextmanager
def loop_errors(loop: Sequence[int] | None) -> Iterator[None]:
    """Turns what a configuration says about blocks that it has not into an error of usage of `--loop`.

    loop: what the option gave; None where it did not, so that the fault is another's.
    """
    from loopmdm.model.config import LoopedBlocksError  # brings torch, which --help does without

    try:
        yield
    except LoopedBlocksError as error:
        blocks = error.num_layers
        if loop is None or blocks is None:
            raise
        raise UsageError(
            f"--loop: got {loop[0]}:{loop[1]}, expected START:END with 0 <= START < END <= {blocks}, the"
            " blocks of the model"
        ) from error


class Sources(argparse.Action):
    """Files, folders and patterns: one as a string, several as a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest) or []
        together = [*([before] if isinstance(before, str) else before), *values]
        setattr(namespace, self.dest, together[0] if len(together) == 1 else together)


def positive_int(text: str) -> int:
    """An option's value of at least 1."""
    return _int(text, 1)


def num_loops(text: str) -> int:
    """A number of loops."""
    return _int(text, 1, most=_most_loops())


def count(text: str) -> int:
    """An option's value of at least 0."""
    return _int(text, 0)


def thread_count(text: str) -> int:
    """A number of processor threads."""
    return _int(text, 1, most=MOST_THREADS)


def positive_float(text: str) -> float:
    """An option's value above 0."""
    value = number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("got 0, expected a number above 0")
    return value


def number(text: str) -> float:
    """An option's finite value of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of at least 0")
    return value


def loop_counts(text: str) -> list[int]:
    """Loop counts such as "1,3,6", each once."""
    return _several(text, "loop counts such as 1,3,6, each at least 1", _most_loops())


def step_counts(text: str) -> list[int]:
    """Numbers of steps such as "16,64", each once."""
    return _several(text, "numbers of steps such as 16,64, each at least 1")


def loop_range(text: str) -> tuple[int, int]:
    """A half-open range of layers such as "1:3"."""
    parts = text.split(":")
    try:
        start, end = map(int, parts)
    except ValueError:
        start, end = 0, -1
    if not 0 <= start <= end:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected START:END, the layers START..END-1 counted from 0, such as 1:3"
        )
    return start, end


def _several(text: str, expected: str, most: int = _MOST) -> list[int]:
    return list(dict.fromkeys(_int(part, 1, expected, most) for part in text.split(",")))


def _most_loops() -> int:
    from loopmdm.model.loop_law import MAX_LOOPS  # brings torch, which --help does without

    return MAX_LOOPS


def _int(text: str, least: int, expected: str | None = None, most: int = _MOST) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value > most:
        limit = "below 2^63" if most == _MOST else f"at most {most}"
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer {limit}")
    if value < least:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected {expected or f'an integer of at least {least}'}"
        )
    return value
