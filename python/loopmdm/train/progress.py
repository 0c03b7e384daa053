"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any

from loopmdm import terminal
from loopmdm.printable import printable_lines


def describe(record: dict[str, Any], steps: int, seconds_left: float) -> str:
    """One line about a training record."""
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.4f}  S {record['num_loops']}"
        f"  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  {clock(seconds_left)} left"
    )


def describe_evaluation(step: int, results: dict[str, Any]) -> str:
    """One line about an evaluation: likelihoods and shares solved in words, anything else as JSON.

    But not samples, which take more than a line.
    """
    parts = []
    for name, value in results.items():
        if name == "held_out" and isinstance(value, list):
            parts += [f"S {r['num_loops']} NLL {_figure(r['nll'])}" for r in value]
        elif name == "solved" and isinstance(value, list):
            parts += [f"S {r['num_loops']} {r['order']} {r['share_solved']:.1%} solved" for r in value]
        elif name != "samples":  # `loopmdm watch` shows them
            parts.append(json.dumps({name: value}))
    return f"step {step}  evaluation: " + ", ".join(parts)


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


class Progress:
    """Shows records on stderr, as a `with` block around the run."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.steps = steps
        self.shown = shown
        self._first = done
        self._bar: Any = None
        self._task: Any = None
        if shown and terminal.standard_error().isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(BarColumn(), TextColumn("{task.description}"), console=terminal.console())
            self._task = self._bar.add_task("starting", total=steps, completed=done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def training(self, record: dict[str, Any], seconds: float) -> None:
        """Show a training record; `seconds` is the time since the `with` block began."""
        if not self.shown:
            return
        done = record["step"] - self._first
        line = describe(record, self.steps, seconds / max(done, 1) * (self.steps - record["step"]))
        if self._bar is None:
            terminal.say(line)
        else:
            self._bar.update(self._task, completed=record["step"], description=line)

    def note(self, text: str) -> None:
        """Show a line about something else than a step."""
        if not self.shown:
            return
        if self._bar is None:
            terminal.say(printable_lines(text))
        else:
            self._bar.console.print(printable_lines(text), markup=False, highlight=False)
