"""The figure of the study `schedules`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loopmdm.study.kit import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


def draw(rows: Sequence[Row]) -> Figure:
    """For each measure: the hand-made schedules, the influence of segments, and where the best are light."""
    measures = [name for name in rows[0] if f"{name}, over all heavy" in rows[0]]
    segments = figures.select(rows, part="segment")
    figure, axes = figures.new_figure(len(measures), 3 if segments else 1, width=5.0, height=3.4)
    for panels, measure in zip(axes, measures, strict=True):
        _hand(panels[0], figures.select(rows, part="hand"), measure)
        if segments:
            _influence(panels[1], segments, measure)
            _frequencies(panels[2], segments, measure)
    return figure


def _hand(panel: Any, rows: Sequence[Row], measure: str) -> None:
    """How much worse than all heavy, the samples being paired; a perplexity in shares of it."""
    name = f"{measure}, over all heavy"
    value, low, high = (figures.column(rows, name + end) for end in ("", ", low", ", high"))
    places = list(range(len(rows)))[::-1]
    sides = [
        [max(0.0, v - at) for v, at in zip(value, low, strict=True)],
        [max(0.0, at - v) for v, at in zip(value, high, strict=True)],
    ]
    panel.errorbar(value, places, xerr=sides, fmt="o", capsize=2)
    panel.axvline(0, color="black", linewidth=0.8)
    labels = [f"{row['name']} ({row['saved, blocks']:.1%} saved)" for row in rows]
    panel.set_yticks(places, labels)
    over = "share over all heavy" if measure == "generative perplexity" else "over all heavy"
    panel.set_xlabel(f"{measure}\n{over} (paired 95 % interval)")
    (heavy,) = figures.select(rows, name="all heavy")
    panel.set_title(f"hand-made schedules (all heavy: {heavy[measure]:.4g})")


def _influence(panel: Any, rows: Sequence[Row], measure: str) -> None:
    name = f"{measure}, influence"
    value, low, high = (figures.column(rows, name + end) for end in ("", ", low", ", high"))
    segments = figures.column(rows, "segment")
    panel.bar(segments, value, color="C0", alpha=0.5)
    figures.error_bars(panel, segments, value, low, high, fmt="none", color="C0")
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(segments)
    panel.set_xlabel("segment (0 = start, all masked)")
    panel.set_ylabel(f"influence on {measure}" if len(measure) < 25 else f"influence on\n{measure}")
    panel.set_title("light there, against the mean: > 0 is harmful")


def _frequencies(panel: Any, rows: Sequence[Row], measure: str) -> None:
    segments = figures.column(rows, "segment")
    ends = [
        name
        for name in rows[0]
        if name.startswith(f"{measure}, in the") and name[-1] != "w" and name[-1] != "h"
    ]
    for offset, name, color in zip((-0.2, 0.2), ends, ("C2", "C3"), strict=True):
        places = [segment + offset for segment in segments]
        panel.bar(places, figures.column(rows, name), width=0.4, color=color, label=name.rpartition(", ")[2])
    panel.set_xticks(segments)
    panel.set_ylim(0, 1)
    panel.set_xlabel("segment (0 = start, all masked)")
    panel.set_ylabel("share of these schedules light there")
    panel.set_title("the best and the worst schedules")
    panel.legend()
