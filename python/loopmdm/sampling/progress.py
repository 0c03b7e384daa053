"""The progress bar of a sampling run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from loopmdm import terminal


@contextmanager
def progress_bar(wanted: bool, num_steps: int) -> Iterator[Callable[[int], object]]:
    """Yields the function to call with how many steps were taken. Draws on standard error, on a terminal."""
    if not wanted:
        yield lambda _: None
        return
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = terminal.console()
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("sampling", total=num_steps)
        yield partial(bar.advance, task)
