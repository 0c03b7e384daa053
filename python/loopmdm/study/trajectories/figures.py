"""How trajectories are drawn: a grid of predicted tokens over loops, boards over loops, and the averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from loopmdm.study.kit import figures
from loopmdm.study.kit.folder import Row
from loopmdm.study.trajectories import CONTEXT

VISIBLE = {" ": "␣", "\n": "↵", "\t": "→", "$": r"\$"}  # $ would start a formula
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
EOS, END = "⟨eos⟩", "∎"
NOTHING = "∅"  # a token that is no character of its own
RIGHT, WRONG = "#1a7f37", "#c62828"
MOST_NATS = 6.0  # where the colours of -log p end
MOST_BOARDS = 6
PALETTE = "YlOrRd"


def visible(text: str) -> str:
    """White space and the end of a text as signs."""
    return "".join(VISIBLE.get(character, character) for character in text.replace(EOS, END))


def draw_tokens(rows: Sequence[Row]) -> tuple[Figure, Any, Any]:
    """A row for each position, a column for each loop; the figure, and two panels below for averages."""
    positions = list(dict.fromkeys(figures.column(rows, "position")))
    loops = sorted({row["k"] for row in rows})
    figure, (grid, left, right) = _with_summary(
        width=4.2 + 0.62 * len(loops), height=1.0 + 0.27 * len(positions)
    )
    image = grid.imshow(
        [[row["nll"] for row in figures.select(rows, position=p)] for p in positions],
        cmap=PALETTE,
        norm=Normalize(0, MOST_NATS),
        aspect="auto",
    )
    labels = []
    for y, position in enumerate(positions):
        part = figures.select(rows, position=position)
        for x, row in enumerate(part):
            color, weight = (RIGHT, "bold") if row["right"] else _on(row["nll"])
            text = visible(row["prediction"]) or NOTHING
            style = {"color": color, "weight": weight, "family": "monospace"}
            grid.text(x, y, text, ha="center", va="center", **style)
            if row["right"]:
                grid.add_patch(_frame(x, y))
        first = part[0]
        before, after = visible(first["before"]), visible(first["after"])
        labels.append(f"{_padding(before)}{before}[{visible(first['truth'])}]{after}{_padding(after)}")
    grid.set_yticks(range(len(positions)), labels, family="monospace", fontsize=9)
    grid.set_xticks(range(len(loops)), map(str, loops))
    grid.set(xlabel="loops k", title="prediction after k loops; framed: right. Truth in [ ], · masked")
    grid.grid(False)
    bar = figure.colorbar(image, ax=grid, pad=0.01, extend="max")
    bar.set_label("-log p(truth), nats")
    return figure, left, right


def draw_boards(rows: Sequence[Row], clues: Sequence[Row]) -> tuple[Figure, Any, Any]:
    """The board after some loop counts; the figure, and two panels below for averages."""
    loops = _spread(max(row["k"] for row in rows), MOST_BOARDS)
    size = math.isqrt(len(clues) + len({row["position"] for row in rows}))
    height = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    figure = Figure(figsize=(2.3 * len(loops), 6.2), layout="constrained")
    top, bottom = _halves(figure, 1, 1.25)
    panels = top.subplots(1, len(loops), squeeze=False)[0]
    for panel, k in zip(panels, loops, strict=True):
        part = figures.select(rows, k=k)
        values = [[0.0] * size for _ in range(size)]
        for row in part:
            values[row["position"] // size][row["position"] % size] = row["nll"]
        image = panel.imshow(values, cmap=PALETTE, norm=Normalize(0, MOST_NATS))
        for row in (*clues, *part):
            y, x = divmod(row["position"], size)
            clue = "prediction" not in row
            color = "0.55" if clue else RIGHT if row["right"] else "black"
            panel.text(
                x, y, row["truth"] if clue else row["prediction"], ha="center", va="center", color=color,
                weight="normal" if clue else "bold", fontsize=80 / size,
            )  # fmt: skip
            if not clue and not row["right"]:
                panel.add_patch(_frame(x, y, WRONG))
        for line in range(size + 1):
            panel.axhline(line - 0.5, color="0.2", linewidth=1.4 if line % height == 0 else 0.3)
            panel.axvline(line - 0.5, color="0.2", linewidth=1.4 if line % (size // height) == 0 else 0.3)
        wrong = sum(not row["right"] for row in part)
        panel.set(xticks=[], yticks=[], title=f"k = {k}: {wrong} of {len(part)} wrong")
        panel.grid(False)
    bar = top.colorbar(image, ax=panels, pad=0.01, extend="max", shrink=0.8)
    bar.set_label("-log p(truth), nats")
    top.suptitle("most probable digit of every blank; grey: clues, framed: wrong", fontsize=10)
    left, right = bottom.subplots(1, 2)
    return figure, left, right


def draw_summary(left: Any, right: Any, summary: Sequence[Row], kinds: Sequence[Row]) -> None:
    """Averages over all masked tokens, paired with the first loop, and how tokens fare."""
    k = figures.column(summary, "k")
    first = summary[0]
    twin = left.twinx()
    twin.spines["right"].set_visible(True)
    twin.grid(False)
    curves = ((left, "nll", "C3", "o", "Δ -log p(truth), nats"), (twin, "right", RIGHT, "s", "Δ share right"))
    for axes, name, color, marker, label in curves:
        values = [figures.column(summary, f"{name}_since_1{end}") for end in ("", "_low", "_high")]
        figures.band(axes, k, *values, color=color, marker=marker)
        axes.set_ylabel(label, color=color)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="loops k")
    left.set_title(
        f"all masked tokens, since k = 1: {first['nll']:.3f} nats, {100 * first['right']:.1f} % right"
    )
    names = figures.column(kinds, "kind")
    values = [figures.column(kinds, f"share{end}") for end in ("", "_low", "_high")]
    right.barh(names, values[0], color=[RIGHT, "#7fc08f", "#e59a9a", WRONG])
    for y, (share, _, high) in enumerate(zip(*values, strict=True)):
        right.text(high + 0.01, y, f"{100 * share:.1f} %", va="center")
    right.errorbar(
        values[0],
        range(len(names)),
        xerr=[
            [max(0.0, v - low) for v, low in zip(values[0], values[1], strict=True)],
            [max(0.0, high - v) for v, high in zip(values[0], values[2], strict=True)],
        ],
        fmt="none",
        color="0.2",
        capsize=2,
    )
    right.invert_yaxis()
    right.set(xlim=(0, 1.12), xlabel="share of masked tokens", title=f"from k = 1 to k = {k[-1]}")


def _with_summary(width: float, height: float) -> tuple[Figure, tuple[Any, Any, Any]]:
    figure = Figure(figsize=(max(width, 8.0), height + 3.2), layout="constrained")
    top, bottom = _halves(figure, height, 3.2)
    left, right = bottom.subplots(1, 2)
    return figure, (top.subplots(), left, right)


def _padding(text: str) -> str:
    """Brings the context of a token to one width; plain spaces at an end would be left out."""
    return NO_BREAK_SPACE * (CONTEXT - len(text.replace(VISIBLE["$"], "$")))


def _halves(figure: Figure, top: float, bottom: float) -> tuple[Any, Any]:
    halves: Any = figure.subfigures(2, 1, height_ratios=(top, bottom))
    return halves[0], halves[1]


def _frame(x: float, y: float, color: str = RIGHT) -> Any:
    return Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=color, linewidth=1.2)


def _on(nats: float) -> tuple[str, str]:
    """Colour and weight of a wrong prediction, readable on its background."""
    return ("white" if nats > 0.6 * MOST_NATS else "0.25"), "normal"


def _spread(last: int, most: int) -> list[int]:
    """At most `most` of 1..last, closer together at the beginning, both ends among them."""
    return sorted({round(k) for k in np.geomspace(1, last, most)})
