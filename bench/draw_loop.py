"""Draws the loop inside the denoiser, and what it brings on 9x9 boards: docs/loop.svg.

python -m bench.draw_loop docs/loop.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from bench.results_page import BOARDS, load
from bench.script import arguments
from loopmdm_kernels.files import write_file

BLUE, RED, GREY, PALE = "#4477aa", "#ee6677", "#555555", "#dde6f0"
ORDERS = {
    "confidence": ("most confident cell first", BLUE),
    "left_to_right": ("cells from left to right", RED),
}
WIDTH, HEIGHT = 860, 330
CHART_LEFT, CHART_TOP, CHART_WIDTH, CHART_HEIGHT = 560, 64, 250, 190
COLUMN_LEFT, COLUMN_WIDTH = 150, 190


def text(
    x: float, y: float, content: str, *, anchor: str = "middle", size: int = 13, color: str = "#222"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{content}</text>'
    )


def box(y: float, height: float, content: str, fill: str, color: str = "#222") -> str:
    middle = COLUMN_LEFT + COLUMN_WIDTH / 2
    return (
        f'<rect x="{COLUMN_LEFT}" y="{y:g}" width="{COLUMN_WIDTH}" height="{height:g}" rx="5" fill="{fill}" '
        f'stroke="{GREY}"/>' + text(middle, y + height / 2 + 5, content, color=color)
    )


def arrow(points: Sequence[tuple[float, float]], color: str = GREY) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8" marker-end="url(#head)"/>'
    )


def denoiser() -> list[str]:
    """One network call, from the bottom up, and the way of its tokens back in."""
    middle, right = COLUMN_LEFT + COLUMN_WIDTH / 2, COLUMN_LEFT + COLUMN_WIDTH
    parts = [text(middle, 28, "one denoising step", size=15)]
    stack = [
        (262, 30, "tokens, some of them masked", "#ffffff", "#222"),
        (214, 30, "block 0", PALE, "#222"),
        (146, 50, "blocks 1 and 2", BLUE, "#ffffff"),
        (98, 30, "blocks 3 to 11", PALE, "#222"),
        (50, 30, "vocabulary head", "#ffffff", "#222"),
    ]
    parts += [box(y, height, content, fill, color) for y, height, content, fill, color in stack]
    parts += [
        arrow([(middle, lower[0]), (middle, upper[0] + upper[1] + 3)]) for lower, upper in pairwise(stack)
    ]
    loop = right + 44
    parts.append(arrow([(right, 156), (loop, 156), (loop, 186), (right + 3, 186)], BLUE))
    parts.append(text(loop + 10, 168, "S times,", anchor="start", color=BLUE))
    parts.append(text(loop + 10, 185, "same weights", anchor="start", color=BLUE))
    back = COLUMN_LEFT - 40
    parts.append(arrow([(COLUMN_LEFT, 65), (back, 65), (back, 277), (COLUMN_LEFT - 3, 277)]))
    parts += [
        text(back - 8, y, line, anchor="end") for y, line in ((160, "some masks"), (177, "are filled in,"))
    ]
    parts.append(text(back - 8, 194, "next step", anchor="end"))
    return parts


def chart() -> list[str]:
    """Shares of boards solved against S, with their standard errors."""
    (name,) = (name for model, name in BOARDS.items() if model.startswith("9x9"))
    result = load(name)
    counts = sorted({r["num_loops"] for r in result["solved"]})

    def at(loops: int, share: float) -> tuple[float, float]:
        step = CHART_WIDTH / (len(counts) - 1)
        return CHART_LEFT + step * counts.index(loops), CHART_TOP + CHART_HEIGHT * (1 - share)

    parts = [
        text(CHART_LEFT + CHART_WIDTH / 2, 28, f"9x9 Sudoku boards solved, of {result['puzzles']}", size=15)
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = at(counts[0], share)
        parts.append(f'<path d="M{CHART_LEFT - 12} {y:g}h{CHART_WIDTH + 24}" stroke="#dddddd"/>')
        parts.append(text(CHART_LEFT - 18, y + 4, f"{100 * share:.0f} %", anchor="end", size=12, color=GREY))
    for loops in counts:
        parts.append(
            text(at(loops, 0)[0], CHART_TOP + CHART_HEIGHT + 20, f"S = {loops}", size=12, color=GREY)
        )
    for number, (order, (label, color)) in enumerate(ORDERS.items()):
        points = []
        for row in (r for r in result["solved"] if r["order"] == order):
            x, y = at(row["num_loops"], row["share_solved"])
            error = CHART_HEIGHT * row["stderr"]
            parts.append(
                f'<path d="M{x:g} {y - error:.1f}V{y + error:.1f}" stroke="{color}" stroke-width="1.5"/>'
            )
            parts.append(f'<circle cx="{x:g}" cy="{y:.1f}" r="3.5" fill="{color}"/>')
            points.append(f"{x:g},{y:.1f}")
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="2"/>')
        legend = CHART_TOP + CHART_HEIGHT + 44 + 18 * number
        parts.append(f'<circle cx="{CHART_LEFT}" cy="{legend - 4}" r="4" fill="{color}"/>')
        parts.append(text(CHART_LEFT + 12, legend, label, anchor="start", size=12))
    return parts


def draw() -> str:
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker>'
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif"><rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return "\n".join([opening, f"<defs>{head}</defs>", *denoiser(), *chart(), "</svg>"]) + "\n"


if __name__ == "__main__":
    write_file(*arguments(__doc__, "picture"), draw())
