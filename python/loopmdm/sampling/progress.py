"""The progress bar of a sampling run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loopmdm import terminal


@contextmanager
def progress_bar(wanted: bool, num_steps: int) -> Iterator[Callable[[], object]]:
    """Yields the function to call after each step. Draws on standard error, and only on a terminal."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = terminal.console()
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task("sampling", total=num_steps)
        yield lambda: bar.advance(task)
