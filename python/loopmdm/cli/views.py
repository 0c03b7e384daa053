"""The options that show a sampling run, `--watch` and `--html`, and what they do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loopmdm.cli.output import writable
from loopmdm.cli.parser import FAILED
from loopmdm.runs.options import UsageError, count, number, positive_int
from loopmdm.sampling import Decoding, SampleResult
from loopmdm.terminal import note
from loopmdm.view import Symbols, Watch, page, write_page
from loopmdm.view.page import is_page
from loopmdm.view.painters import Painter
from loopmdm.view.predictions import predict_loops

PainterOf = Callable[[Sequence[str], "int | None"], Painter]


def add_views(parser: argparse.ArgumentParser, *, sequences: str, html_loops: int) -> None:
    """Options of a command that samples. sequences: what it calls them; html_loops: a default."""
    group = parser.add_argument_group("views")
    group.add_argument(
        "--watch",
        action="store_true",
        help="show masks being filled in, step by step, on standard error; a line for a step where that is"
        " not a terminal",
    )
    group.add_argument(
        "--watch-samples",
        type=positive_int,
        metavar="N",
        help=f"{sequences} to watch (default: as many as have room)",
    )
    group.add_argument(
        "--watch-delay",
        type=number,
        default=0.0,
        metavar="SECONDS",
        help="a watched step lasts at least this long, to follow a fast run (default: %(default)s)",
    )
    group.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page to look at the run with: a slider over steps and loops; token, probability and"
        " loops spent at every position. It is one file and needs no network",
    )
    group.add_argument(
        "--html-loops",
        type=count,
        metavar="K",
        help="for K steps spread over the run, the page also holds what the model predicts after 1, 2 .. S"
        f" loops; this runs the network K S times more for each of the {sequences} (default: {html_loops};"
        " 0: not at all)",
    )
    parser.set_defaults(html_loops_default=html_loops)


class Views:
    """What the options of `add_views` ask for; checks them before anything is computed."""

    def __init__(self, args: argparse.Namespace) -> None:
        if not args.watch:
            for name, default in (("watch_samples", None), ("watch_delay", 0.0)):
                if getattr(args, name) != default:
                    raise UsageError(f"--{name.replace('_', '-')}: it belongs to --watch")
        if args.html is None and args.html_loops:
            raise UsageError("--html-loops: it belongs to --html")
        if args.html is not None:
            writable("--html", args.html)
            if args.html.is_file() and args.html.stat().st_size and not is_page(args.html):
                raise UsageError(
                    f"--html: {args.html} is a file that this option did not write; choose another name"
                )
        self._args = args
        self.status = 0  # of the command, whose results are printed even if the page cannot be written

    @property
    def wanted(self) -> bool:
        """Whether there is anything to show."""
        return bool(self._args.watch or self._args.html is not None)

    def run(
        self,
        sampler: Callable[..., SampleResult],
        model: Any,
        canvas: Tensor,
        decoding: Decoding,
        symbols: Symbols,
        painter: PainterOf,
        *,
        titles: Sequence[str],
        title: str,
        facts: dict[str, str],
    ) -> SampleResult:
        """Call `sampler(on_step=, history=, progress=)` and show what it does.

        canvas is [B, L] before the first step, titles names its sequences; title and facts are for the page.
        """
        args, mask = self._args, model.config.mask_token_id
        with ExitStack() as stack:
            watch = None
            if args.watch:
                drawn = painter(titles, args.watch_samples)
                most = int((canvas == mask).sum(dim=1).max())
                steps = decoding.num_steps(canvas.shape[1], most)
                watch = stack.enter_context(
                    Watch(canvas, mask, drawn, num_steps=steps, delay=args.watch_delay)
                )
            result = sampler(on_step=watch, history=args.html is not None, progress=watch is None)
            if watch is not None:
                watch.finish(result)
                result = replace(result, seconds=result.seconds - watch.seconds)
        if args.html is not None:
            assert result.history is not None
            predictions = predict_loops(
                model,
                canvas,
                result.history,
                result.plan,
                result.num_steps,
                most_states=args.html_loops_default if args.html_loops is None else args.html_loops,
                dtype=decoding.dtype,
            )
            facts = facts | {
                "steps": str(result.num_steps),
                "plan": str(result.plan),
                "network calls": str(result.total_network_calls),
                "loops": str(int(result.loops.sum())),
                "seconds": f"{result.seconds:.1f}",
            }
            text = page(
                canvas,
                mask,
                result.history,
                symbols,
                title=title,
                lengths=result.lengths.tolist(),
                titles=titles,
                facts=facts,
                predictions=predictions,
            )
            try:
                write_page(args.html, text)
                note(f"wrote {args.html} ({len(text.encode()) / 1e6:.2f} MB)")
            except OSError as error:
                note(f"error: --html: {error}")
                self.status = FAILED
        return result
