"""A training run as it stands, from its folder: lines of a terminal, or a page."""

from __future__ import annotations

import html
import textwrap
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from loopmdm.formats.folders import read_json
from loopmdm.printable import printable, printable_lines
from loopmdm.runs.run_file import RUN_FILE
from loopmdm.train.loop import CONFIG_FILE
from loopmdm.train.metrics import METRICS_FILE, Follower, averages, held_out, results
from loopmdm.train.progress import clock
from loopmdm.view.charts import Point, Series, chart, number
from loopmdm_kernels.locks import LOCK_FILE

_HEAD = '<!doctype html>\n<html lang="en">\n<meta name="generator" content="loopmdm watch">\n'
_FIGURES = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"}
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_NAME, _FIGURE = 28, 10  # cells of a name and of a figure on the terminal
Curve = list[tuple[float, float]]


class WatchedRun:
    """What there is to see of the run in a folder; `read` takes what has come.

    Raises:
        FileNotFoundError: the folder holds no run.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            raise FileNotFoundError(f"there is no folder {folder}")
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{folder} holds no run: there is no {CONFIG_FILE}")
        self.folder, self.name = folder, folder.resolve().name
        self._log = Follower(folder / METRICS_FILE)
        self.steps = 0
        self._pairs = False

    def read(self) -> bool:
        """Whether anything has come since."""
        steps = read_json(self.folder / CONFIG_FILE).get("steps")
        if type(steps) is not int:
            raise ValueError(f"{self.folder / CONFIG_FILE}: steps: got {steps!r}, expected an integer")
        self.steps = steps
        described = self.folder / RUN_FILE
        self._pairs = described.is_file() and read_json(described).get("pairs") is not None
        return self._log.read()

    @property
    def records(self) -> list[dict[str, Any]]:
        return self._log.records

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def finished(self) -> bool:
        """Whether all steps are done and nobody trains there any more."""
        return self.step >= self.steps and not (self.folder / LOCK_FILE).exists()

    def curves(self) -> dict[str, Curve]:
        """By name: figures of steps, then held-out NLL and shares of puzzles solved by S."""
        curves: dict[str, Curve] = {}
        for key, name in _FIGURES.items():
            points = [(r["step"], r[key]) for r in self.records if isinstance(r.get(key), (int, float))]
            if points:
                curves[name] = averages(points)
        curves |= {f"held-out NLL, S {loops}": [*c] for loops, c in held_out(self.records).items()}
        for record in self.records:
            for one in results(record, "solved"):
                name = f"solved {one['order'].replace('_', ' ')}, S {one['num_loops']}"
                curves.setdefault(name, []).append((record["step"], one["share_solved"]))
        return curves

    def samples(self) -> tuple[int, list[dict[str, Any]]]:
        """The step of the newest samples, and they."""
        for record in reversed(self.records):
            if samples := results(record, "samples"):
                return record["step"], samples
        return 0, []

    def to_dict(self) -> dict[str, Any]:
        """JSON values of what is shown."""
        samples_at, samples = self.samples()
        return {
            "run": str(self.folder),
            "step": self.step,
            "steps": self.steps,
            "finished": self.finished,
            "damaged_lines": self._log.damaged,
            "curves": {name: [[*point] for point in curve] for name, curve in self.curves().items()},
            "samples_at": samples_at,
            "samples": samples,
        }

    def headline(self) -> str:
        """Where the run is, in a line."""
        last = next((record for record in reversed(self.records) if "loss" in record), None)
        if last is None:
            return f"{self.name}  no record of a step yet"
        words = [f"{self.name}  step {last['step']:,} of {self.steps:,}", f"S {last['num_loops']}"]
        if "tokens_per_second" in last:
            words.append(f"{last['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in last:
            words.append(f"MFU {last['mfu']:.1%}")
        if "peak_memory" in last:
            words.append(f"memory {last['peak_memory'] / 2**30:.2f} GiB")
        if self.finished:
            words.append("done")
        else:
            left = last["seconds"] / last["step"] * (self.steps - last["step"])
            age = max(0.0, time.time() - self._log.path.stat().st_mtime)
            words += [f"{clock(left)} left", f"last record {clock(age)} ago"]
        if self._log.damaged:
            words.append(f"{self._log.damaged} damaged line{'s'[: self._log.damaged > 1]} left out")
        return "  ".join(words)

    def lines(self, width: int, height: int, *, plain: bool = False) -> list[str]:
        """The panel in at most `height` lines of at most `width` cells. plain: in ASCII."""
        lines = textwrap.wrap(printable(self.headline()), width)
        room = max(8, width - _NAME - 2 * _FIGURE - 4)
        curves = self.curves()
        if curves:
            lines += ["", f"{'':{_NAME}} {'first':>{_FIGURE}} {'last':>{_FIGURE}}"]
        for name, curve in curves.items():
            first, last = (f"{value:>{_FIGURE}.5g}" for value in (curve[0][1], curve[-1][1]))
            lines.append(f"{name:{_NAME}} {first} {last}  {_bars(curve, room, plain)}")
        step, samples = self.samples()
        if samples:
            lines += ["", f"samples at step {step:,}"]
            lines += [f"S {one['num_loops']}  {_in_line(self._whole(one))}" for one in samples]
        return [_cut(printable(line, longest=4 * width), width) for line in lines][:height]

    def page(self, seconds: float | None) -> str:
        """The page, one file without a script. seconds: after which a browser reads it again; None: never."""
        curves = self.curves()
        style = files("loopmdm.view").joinpath("charts.css").read_text(encoding="utf-8")
        again = "" if seconds is None else f'<meta http-equiv="refresh" content="{max(1, round(seconds))}">\n'
        drawn = "".join(f"<figure>{one}</figure>" for one in _charts(curves))
        step, samples = self.samples()
        rows = "".join(
            f"<tr><td>{one['num_loops']}</td><td><pre>{html.escape(printable_lines(self._whole(one)))}</pre></td></tr>"
            for one in samples
        )
        head = f"<h2>Samples at step {step:,}</h2>\n<table><tr><th>S</th><th>sample</th></tr>"
        title = html.escape(printable(self.name))
        return (
            f'{_HEAD}<meta charset="utf-8">\n{again}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>\n{style}pre {{ white-space: pre-wrap; }}\n</style>\n"
            f"<h1>Training {title}</h1>\n<p>{html.escape(printable(self.headline()))}</p>\n"
            f'<div class="charts">{drawn}</div>\n{f"{head}{rows}</table>" if samples else ""}\n</html>\n'
        )

    def _whole(self, sample: dict[str, Any]) -> str:
        """A puzzle or question and what answers it apart, a text and how it goes on together."""
        apart = "solved" in sample or (self._pairs and sample["prompt"])
        return f"{sample['prompt']}{' → ' if apart else ''}{sample['text']}"


def is_page(path: Path) -> bool:
    """Whether a file begins as those of `WatchedRun.page` do."""
    with path.open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD.encode()


def _charts(curves: dict[str, Curve]) -> Iterator[str]:
    """One for each figure; curves that differ in S alone share one."""
    groups: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        what, _, which = name.partition(", ")
        groups.setdefault(what, {})[which or what] = curve
    for what, members in groups.items():
        series = [
            Series(
                name,
                [Point(x, y, label=f"step {number(x)}: {number(y)}") for x, y in curve],
                mark=len(curve) == 1 or name != what,
            )
            for name, curve in members.items()
        ]
        yield chart(series, x="step", y=what, title=what)


def _bars(curve: Sequence[tuple[float, float]], room: int, plain: bool) -> str:
    values = [y for _, y in curve]
    count = min(room, len(values))
    groups = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    bars = _PLAIN_BARS if plain else _BARS
    return "".join(bars[round((value - low) / (high - low or 1) * (len(bars) - 1))] for value in means)


def _cut(line: str, width: int) -> str:
    """What of a line fits into `width` cells; some characters take two."""
    return line if cell_len(line) <= width else set_cell_size(line, width).rstrip()


def _in_line(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "⇥")
