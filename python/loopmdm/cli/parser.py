"""A parser whose errors are one line, the values options take, and options several commands share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from loopmdm.printable import printable_lines

if TYPE_CHECKING:
    import torch

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_CELLS = re.compile(r"-[-.0-9_*xX\s|+]{15,}")
# Below every --help.
FOOTER = (
    "exit status: 0 done; 1 failed, such as an input that is missing or damaged; 2 bad usage;"
    "\n130 interrupted, 143 terminated, 141 the reader of the output is gone"
    "\nwords that are printed, such as S, plan, NELBO, PPL: docs/glossary.md"
)


class UsageError(Exception):
    """Options that are each fine and do not go together, or values that only the library can judge."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns what the library says about a value into an error of usage."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if getattr(error, "of_the_model", False):  # what it predicts is no fault of the options
            raise
        raise UsageError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and what may have been meant; `--help` has the rest."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Words left over belong to an option of `Sources`, as in --data a.txt b.txt.

        Only then: in `--data a.txt MODEL` the model is no source.
        """
        values, rest = self.parse_known_args(args, namespace)
        sources = [action for action in _actions(self) if isinstance(action, Sources)]
        if sources and any(not word.startswith("-") for word in rest):
            for action in sources:
                action.nargs = "+"
            values, rest = self.parse_known_args(args, namespace)
        if rest:
            options = [name for action in _actions(self) for name in action.option_strings]
            close = "".join(_meant(word.partition("=")[0], options) for word in rest if word.startswith("-"))
            self.error(f"unrecognized arguments: {' '.join(rest)}{close}")
        return values

    def _parse_optional(self, arg_string: str) -> Any:
        # A Sudoku board may begin with a dash for a blank; no option looks like that.
        return None if _CELLS.fullmatch(arg_string) else super()._parse_optional(arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            accepted = list(map(str, action.choices))
            message = f"invalid choice: {value!r} (choose from {', '.join(accepted)})"
            raise argparse.ArgumentError(action, message + _meant(value, accepted))

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {printable_lines(message)} (see {self.prog} --help)\n")


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


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments, those of commands of the command among them."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _meant(word: Any, accepted: Iterable[str]) -> str:
    from loopmdm_kernels.values import meant  # brings torch, which --help does without

    return meant(word, accepted)


def positive_int(text: str) -> int:
    """An option's value of at least 1."""
    return _int(text, 1)


def count(text: str) -> int:
    """An option's value of at least 0."""
    return _int(text, 0)


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
    return list(
        dict.fromkeys(_int(part, 1, "loop counts such as 1,3,6, each at least 1") for part in text.split(","))
    )


def loop_range(text: str) -> tuple[int, int]:
    """A half-open range of layers such as "1:3"."""
    start, _, end = text.partition(":")
    try:
        return int(start), int(end)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected START:END, the layers START..END-1 counted from 0, such as 1:3"
        ) from None


def _int(text: str, least: int, expected: str | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected {expected or f'an integer of at least {least}'}"
        )
    return value


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--json", action="store_true", help=f"print {what} as one JSON document on standard output"
    )


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Where to compute, and on how many threads."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    group.add_argument("--threads", type=positive_int, help="processor threads (default: those of torch)")


def set_up(args: argparse.Namespace) -> torch.device:
    """Apply the options of `add_runtime`; the device to compute on."""
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise UsageError(f"--device: got {args.device!r}, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: got {args.device!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"--device {args.device}: torch finds {torch.cuda.device_count()} GPUs on this machine"
        )
    return device
