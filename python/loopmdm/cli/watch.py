"""Look at a training run while it goes on: loss, learning rate, gradient norm, NLL by S, and samples.

The folder of the run is read, and nothing but the page is written: any process may watch, on any machine that
sees the folder, also a run of several processes. On a terminal the panel is drawn again and again until the
run is done or Ctrl-C; elsewhere it is printed once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from loopmdm import terminal
from loopmdm.cli.output import print_json, show, writable
from loopmdm.cli.parser import add_json
from loopmdm.runs.options import UsageError, positive_float
from loopmdm.runs.watching import WatchedRun, is_page
from loopmdm.terminal import note
from loopmdm_kernels.files import write_file

if TYPE_CHECKING:
    from rich.live import Live

EPILOG = """examples:
  loopmdm watch run
  loopmdm watch run --html run.html          a page that the browser reads again while the run goes on
  loopmdm watch run --html run.html --once   of a run as it stands
"""
_LINES = 200  # where there is no terminal to fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page with charts, again whenever there is something new; it is one file and needs no"
        " network",
    )
    parser.add_argument(
        "--every",
        type=positive_float,
        default=2.0,
        metavar="SECONDS",
        help="look for something new so often (default: %(default)g)",
    )
    parser.add_argument("--once", action="store_true", help="show the run as it stands")
    add_json(parser, "the run as it stands")


def run(args: argparse.Namespace) -> int:
    if args.html is not None:
        writable("--html", args.html)
        if args.html.is_file() and args.html.stat().st_size and not is_page(args.html):
            raise UsageError(
                f"--html: {args.html} is a file that this option did not write; choose another name"
            )
    watched = WatchedRun(args.run)
    watched.read()
    drawn = sys.stdout.isatty()
    if args.json or args.once or watched.finished or not (drawn or args.html is not None):
        _write(args.html, watched, None)
        if args.json:
            print_json(watched.to_dict())
            return 0
        size = shutil.get_terminal_size()
        plain = not terminal.has_encoding_for("▁█")
        for line in watched.lines(size.columns, _LINES, plain=plain):
            show(terminal.encodable(line))
        return 0
    _follow(args, watched, drawn)
    return 0


def _follow(args: argparse.Namespace, watched: WatchedRun, drawn: bool) -> None:
    """Until the run is done, or Ctrl-C, which leaves the run alone."""
    with ExitStack() as stack:
        live = stack.enter_context(_live()) if drawn else None
        if args.html is not None:
            note(f"writing {args.html} until the run is done")
        _write(args.html, watched, args.every)
        try:
            while not watched.finished:
                if live is not None:
                    _draw(live, watched)
                time.sleep(args.every)
                if watched.read():
                    _write(args.html, watched, args.every)
        except KeyboardInterrupt:
            pass
        watched.read()
        if live is not None:
            _draw(live, watched)
        _write(args.html, watched, None)


def _live() -> Live:
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(), auto_refresh=False, vertical_overflow="crop")


def _draw(live: Live, watched: WatchedRun) -> None:
    from rich.text import Text

    size = live.console.size
    plain = not terminal.has_encoding_for("▁█")
    lines = watched.lines(size.width, max(1, size.height - 1), plain=plain)
    live.update(Text("\n".join(map(terminal.encodable, lines))), refresh=True)


def _write(path: Path | None, watched: WatchedRun, seconds: float | None) -> None:
    if path is not None:
        write_file(path, watched.page(seconds))
