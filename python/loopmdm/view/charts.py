"""Charts as inline SVG: lines and points with intervals, linear or logarithmic. No script, no file."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 40
_MARKS = ("circle", "square", "diamond", "triangle")
_ROW = 15  # height of a line of the legend


class Point(NamedTuple):
    x: float
    y: float
    low: float | None = None  # ends of the interval of y
    high: float | None = None
    label: str = ""


class Series(NamedTuple):
    name: str
    points: Sequence[Point]
    line: bool = True
    mark: bool = True


class Axis(NamedTuple):
    """Of values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (self._scaled(v) for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _step(rough: float) -> float:
    unit = 10.0 ** math.floor(math.log10(rough))
    return unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    return [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]


def number(value: float) -> str:
    """Short, with a power of ten where digits would not fit."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    x_log: bool = False,
    y_log: bool = False,
    x_ticks: Sequence[float] | None = None,
    title: str,
) -> str:
    """A chart of lines and points. x, y: names of the axes with units. title: what a screen reader says."""
    points = [point for one in series for point in one.points]
    across = _axis([p.x for p in points], _LEFT, WIDTH - _RIGHT, x_log)
    reach = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    up = _axis(reach if y_log else [0.0, *reach], HEIGHT - _BOTTOM, _TOP, y_log)
    parts = [
        *_grid(across, up, across.ticks() if x_ticks is None else x_ticks, x, y),
        *(part for i, one in enumerate(series) for part in _drawn(one, i, across, up)),
        *_legend([one.name for one in series]),
    ]
    return _svg(parts, HEIGHT + _ROW * len(series), title)


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, Point]]]], *, x: str, one: float, title: str) -> str:
    """Groups of marks with intervals along x. rows: (heading, [(name, Point)]); one: where a line is."""
    lines = sum(1 + len(group) for _, group in rows)
    bottom = 14 * lines + 8
    reach = [v for _, group in rows for _, p in group for v in (p.x, p.low, p.high) if v is not None]
    across = _axis([one, *reach], 150, WIDTH - 46, True)
    parts = [_line(across(t), 0, across(t), bottom, "grid") for t in across.ticks()]
    parts += [_text(across(t), bottom + 13, number(t), "middle") for t in across.ticks()]
    parts += [
        _line(across(one), 0, across(one), bottom, "axis"),
        _text(WIDTH / 2 + 50, bottom + 28, x, "middle"),
    ]
    at = 0
    names = list(dict.fromkeys(name for _, group in rows for name, _ in group))
    for heading, group in rows:
        at += 14
        parts.append(_text(2, at - 2, heading, "start", "strong"))
        for name, point in group:
            at += 14
            parts += [_text(144, at - 2, name, "end"), *_whisker(point, across, at - 6, names.index(name))]
            parts.append(_text(WIDTH - 2, at - 2, f"{point.x:.2f}", "end"))
    return _svg(parts, bottom + 34, title)


def _whisker(point: Point, across: Axis, at: float, index: int) -> Iterator[str]:
    if point.low is not None and point.high is not None:
        yield _line(across(point.low), at, across(point.high), at, f"s{index}")
    yield _mark(across(point.x), at, index, point.label)


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> Axis:
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        margin = 0.05 * ((high - low) or abs(high) or 1.0)
        low, high = (low if low == 0 else low - margin), high + margin
    return Axis(low, high, start, end, log)


def _grid(across: Axis, up: Axis, x_ticks: Sequence[float], x: str, y: str) -> Iterator[str]:
    floor = HEIGHT - _BOTTOM
    for tick in up.ticks():
        yield _line(_LEFT, up(tick), WIDTH - _RIGHT, up(tick), "grid")
        yield _text(_LEFT - 4, up(tick) + 4, number(tick), "end")
    for tick in x_ticks:
        yield _line(across(tick), floor, across(tick), floor + 4, "axis")
        yield _text(across(tick), floor + 16, number(tick), "middle")
    yield _line(_LEFT, floor, WIDTH - _RIGHT, floor, "axis")
    yield _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, x, "middle")
    middle = (_TOP + floor) / 2
    yield (
        f'<text x="11" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 11 {middle:.1f})">'
        f"{html.escape(y)}</text>"
    )


def _drawn(series: Series, index: int, across: Axis, up: Axis) -> Iterator[str]:
    if series.line:
        path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in series.points)
        yield f'<polyline class="s{index}" points="{path}"/>'
    for point in series.points if series.mark else ():
        if point.low is not None and point.high is not None:
            yield _line(across(point.x), up(point.low), across(point.x), up(point.high), f"s{index}")
        yield _mark(across(point.x), up(point.y), index, point.label)


def _legend(names: Sequence[str]) -> Iterator[str]:
    for index, name in enumerate(names):
        at = HEIGHT + _ROW * index + 4
        yield _mark(_LEFT + 4, at, index, "")
        yield _text(_LEFT + 14, at + 4, name, "start")


def _mark(x: float, y: float, index: int, label: str) -> str:
    shapes: dict[str, Callable[[float, float], str]] = {
        "circle": lambda x, y: f'<circle class="m{index}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>',
        "square": lambda x, y: _polygon(index, x, y, ((-3, -3), (3, -3), (3, 3), (-3, 3))),
        "diamond": lambda x, y: _polygon(index, x, y, ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0))),
        "triangle": lambda x, y: _polygon(index, x, y, ((0, -4), (4, 3.5), (-4, 3.5))),
    }
    shape = shapes[_MARKS[index % len(_MARKS)]](x, y)
    return f"<g><title>{html.escape(label)}</title>{shape}</g>" if label else shape


def _polygon(index: int, x: float, y: float, corners: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="m{index}" points="{path}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text{of} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    label = html.escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
