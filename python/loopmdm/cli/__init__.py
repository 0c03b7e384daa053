"""The command line. A command is a module of this folder, imported when it is asked for.

Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated, 141 the reader of the
output is gone (as SIGPIPE ends other tools; files are written all the same).
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import TextIO

from loopmdm import terminal
from loopmdm.cli.blame import option_meant
from loopmdm.cli.parser import FAILED, FOOTER, INTERRUPTED, USAGE, Parser, chosen
from loopmdm.printable import printable_lines
from loopmdm.runs.options import UsageError, blame, option_of

COMMANDS = {
    "demo": "solve Sudoku with the shipped models, train a little, compare speed with plain PyTorch",
    "train": "train a model on your own text, or on Sudoku",
    "watch": "look at a training run while it goes on, on the terminal or as a page",
    "data": "tokenise a corpus once, into shards that training reads from disk",
    "sample": "write text with a trained model",
    "eval": "measure held-out likelihood, or the share of puzzles solved, at several loop counts",
    "lm-eval": "run lm-evaluation-harness on a model",
    "solve": "solve Sudoku puzzles",
    "study": "run an analysis of the papers on your own models: a table and a figure",
    "bench": "time the kernels beside plain PyTorch, or tune those for GPUs",
    "convert": "turn a reference (MDLM) checkpoint into config.json and model.safetensors",
    "qualify": "find out which kernels are right and faster on this machine, to be used from then on",
    "doctor": "say what works on this machine, and why the rest does not",
}
# In the errors of numpy and of torch, on a CPU and on a GPU.
_ALLOCATION = re.compile(r"[Aa]llocate (\d[\d.]* \w+)")
_BEYOND_COUNTING = re.compile(
    r"Storage size calculation overflowed|array is too big|Maximum allowed dimension"
)
_EXPECTED = (UsageError, ValueError, TypeError, OSError, ImportError, RuntimeError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the one of this process) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = f"loopmdm {arguments[0]}" if arguments and arguments[0] in COMMANDS else "loopmdm"
    terminal.prepare()
    try:
        return _run_and_explain(program, arguments)
    finally:
        terminal.finish(sys.stderr)


def _run_and_explain(program: str, arguments: list[str]) -> int:
    status, failure = 0, None
    try:
        status = _dispatch(arguments)
    except (KeyboardInterrupt, Exception) as error:
        failure = error
    lost = terminal.finish(sys.stdout)
    if isinstance(failure or lost, BrokenPipeError):  # errors about files name them, and are of other types
        return _BROKEN_PIPE
    if type(failure) is OSError and failure.errno in _FULL and failure.filename is None:
        failure, lost = None, failure
    if failure is None and lost is not None:
        failure = OSError(f"cannot write to standard output: {lost.strerror}")
    if failure is None:
        return status
    if isinstance(failure, KeyboardInterrupt):
        _complain(program, "interrupted")
        return INTERRUPTED
    if isinstance(failure, UsageError):
        _complain(program, f"error: {_told(failure)} (see {program} --help)")
        return USAGE
    if "--debug" in arguments:
        sys.excepthook = _show_traceback
        raise failure
    _complain(program, f"error: {_told(failure)}")
    return FAILED


def _dispatch(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0] not in COMMANDS:
            parser = _top_parser()
            parser.parse_args(arguments)
            parser.error("which command?")
        return _run(*arguments)
    except SystemExit as stop:  # argparse, after --help or an error of usage
        return stop.code if isinstance(stop.code, int) else FAILED


def _run(name: str, *arguments: str) -> int:
    command = import_module(f"loopmdm.cli.{name.replace('-', '_')}")
    parser = Parser(
        prog=f"loopmdm {name}",
        description=command.__doc__,
        epilog=f"{command.EPILOG.rstrip()}\n\n{FOOTER}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status: int = command.run(args)
        except Exception as error:
            if option_of(error) is None:
                blame(error, option_meant(chosen(parser, args), arguments, args, _describe(error)))
            raise
    return status


def _top_parser() -> Parser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="loopmdm",
        usage="loopmdm COMMAND [options]",
        description="Looped masked diffusion language models: train, sample, evaluate.",
        epilog=f"commands:\n{listed}\n\n`loopmdm COMMAND --help` explains a command and shows an example."
        f"\n\n{FOOTER}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from loopmdm_kernels.version import __version__

        print(f"loopmdm {__version__}")
        parser.exit()


def _told(error: Exception) -> str:
    """The message of an error, behind the option that it is about."""
    text, option = _describe(error), option_of(error)
    return text if option is None or text.startswith(option) else f"{option}: {text}"


def _describe(error: Exception) -> str:
    """The message of an error; with its type where the message alone may say little."""
    text = str(error).strip()
    wanted = _ALLOCATION.search(text)
    beyond = isinstance(error, (RuntimeError, ValueError)) and _BEYOND_COUNTING.search(text)
    if isinstance(error, MemoryError) or beyond or (isinstance(error, RuntimeError) and wanted):
        asked = f": {wanted[1]} were asked for at once" if wanted else ""
        return f"not enough memory{asked}; a smaller batch, length or model takes less"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, _EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    terminal.say(printable_lines("".join(traceback.format_exception(kind, error, trace)).rstrip()))


def _complain(program: str, message: str) -> None:
    terminal.say(f"{program}: {printable_lines(message)}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    terminal.say(f"loopmdm: warning: {printable_lines(str(message))}")
