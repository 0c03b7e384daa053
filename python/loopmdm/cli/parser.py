"""A parser whose errors are one line, and options several commands share."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from loopmdm import terminal
from loopmdm.printable import printable_lines
from loopmdm.runs.options import Sources, UsageError, thread_count

if TYPE_CHECKING:
    import torch

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_CELLS = re.compile(r"-[-.0-9_*xX\s|+]{15,}")
_MAY_BE_EMPTY = ("prompt", "infill")  # text
# In a wheel the documents that help names lie in the package, in a checkout beside its sources.
_PACKAGE = Path(__file__).resolve().parents[1]
DOCS = _PACKAGE / "docs" if (_PACKAGE / "docs").is_dir() else _PACKAGE.parents[1] / "docs"
# Below every --help.
FOOTER = (
    "exit status: 0 done; 1 failed, such as an input that is missing or damaged; 2 bad usage;"
    "\n130 interrupted, 143 terminated, 141 the reader of the output is gone"
    f"\nwords that are printed, such as S, plan, NELBO, PPL: docs/glossary.md\ndocs/ is {DOCS}"
)


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

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # An empty path would be the working directory: what is left of "$UNSET" in a script.
        if not arg_string and action.dest not in _MAY_BE_EMPTY and action.nargs != argparse.PARSER:
            raise argparse.ArgumentError(action, "got '', expected something")
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            accepted = list(map(str, action.choices))
            message = f"invalid choice: {value!r} (choose from {', '.join(accepted)})"
            raise argparse.ArgumentError(action, message + _meant(value, accepted))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help that cannot be written is an error like any other output: argparse would pass over it."""
        if message:
            (terminal.standard_error() if file in (None, sys.stderr) else file).write(message)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {printable_lines(message)} (see {self.prog} --help)\n")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments, those of commands of the command among them."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def chosen(parser: argparse.ArgumentParser, values: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser whose options were read: that of the command's command, where it has some."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return chosen(action.choices[getattr(values, action.dest)], values)
    return parser


def _meant(word: Any, accepted: Iterable[str]) -> str:
    from loopmdm_kernels.values import meant  # brings torch, which --help does without

    return meant(word, accepted)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--json", action="store_true", help=f"print {what} as one JSON document on standard output"
    )


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Where to compute, and on how many threads."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    group.add_argument("--threads", type=thread_count, help="processor threads (default: those of torch)")


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
