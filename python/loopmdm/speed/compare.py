"""What moved between two runs of `loopmdm bench` beyond the noise of both."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loopmdm.printable import printable
from loopmdm.speed.intervals import apart

SETTINGS = ("preset", "batch", "length", "loops", "rows", "dtype", "device", "backend")


class Moved(NamedTuple):
    """One kernel: its time, and its speed-up over plain PyTorch, which was timed in the same turns."""

    name: str
    old_ms: float
    new_ms: float
    old_speedup: tuple[float, float, float]  # median, and the ends of its interval
    new_speedup: tuple[float, float, float]
    machine: bool  # whether plain PyTorch's own times moved

    @property
    def verdict(self) -> str:
        if not apart(self.old_speedup, self.new_speedup):
            return "same"
        return "faster" if self.new_speedup[0] > self.old_speedup[0] else "slower"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `loopmdm bench --json` wrote.

    Raises:
        ValueError: it is something else, or of a version that wrote no intervals.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({printable(str(error))})") from error
    figures = document.get("figures") if isinstance(document, dict) else None
    if not isinstance(figures, dict) or not figures or not all(map(_is_figure, figures.values())):
        raise ValueError(f"{path}: holds no figures of `loopmdm bench --json` with intervals")
    found: dict[str, Any] = document
    return found


def _is_figure(figure: Any) -> bool:
    return isinstance(figure, dict) and all(
        isinstance(interval, list)
        and len(interval) == 3
        and all(isinstance(v, int | float) for v in interval)
        for interval in (figure.get("speedup"), *_intervals(figure))
    )


def _intervals(figure: Mapping[str, Any]) -> list[Any]:
    intervals = figure.get("interval_ms")
    return list(intervals.values()) if isinstance(intervals, dict) and "reference" in intervals else [None]


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Settings in which two runs differ, so that their times cannot be compared."""
    return [
        f"{name} {printable(str(old.get(name)))} then, {new[name]} now"
        for name in SETTINGS
        if old.get(name) != new[name]
    ]


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Moved]:
    """Kernels that both runs have timed."""
    backend = new["backend"]
    return [
        Moved(
            name,
            before["interval_ms"][backend][0],
            after["interval_ms"][backend][0],
            tuple(before["speedup"]),
            tuple(after["speedup"]),
            apart(before["interval_ms"]["reference"], after["interval_ms"]["reference"]),
        )
        for name, after in new["figures"].items()
        if (before := old["figures"].get(name)) is not None and backend in before["interval_ms"]
    ]
