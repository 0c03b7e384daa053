"""One style for all figures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIME_LABEL = "time t (share of masked tokens; 1 = all masked)"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.4,
    "savefig.dpi": 110,
    "figure.facecolor": "white",
}


def require_matplotlib() -> None:
    """Fail before hours of computation rather than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'loopmdm-kernels[plot]'") from error


def style() -> AbstractContextManager[None]:
    """The context to draw figures in."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 5.0, height: float = 3.6
) -> tuple[Figure, Any]:
    """A figure and its axes [rows, columns]; width and height in inches are of one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def band(axes: Any, x: ArrayLike, value: ArrayLike, low: ArrayLike, high: ArrayLike, **options: Any) -> None:
    """A line with its interval shaded."""
    (line,) = axes.plot(x, value, **{"marker": "o", **options})
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def error_bars(
    axes: Any, x: ArrayLike, value: ArrayLike, low: ArrayLike, high: ArrayLike, **options: Any
) -> None:
    """Points with their intervals as bars."""
    import numpy as np

    center = np.asarray(value, dtype=float)
    sides = np.maximum(0.0, [center - np.asarray(low, dtype=float), np.asarray(high, dtype=float) - center])
    axes.errorbar(x, center, yerr=sides, **{"fmt": "o", "capsize": 2, **options})


def column(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """One column of a table."""
    return [row[name] for row in rows]


def select(rows: Sequence[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]
