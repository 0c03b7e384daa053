"""Draws one loop of the Hopper kernel's schedule, by the times of the cost model: docs/schedule.svg.

python -m bench.draw_schedule docs/schedule.svg    the picture; the tables of phases are printed
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from bench.script import arguments
from loopmdm_kernels.files import write_file
from loopmdm_kernels.schedule import (
    BackwardPlan,
    BlockShape,
    Device,
    Forward,
    Instruction,
    Phase,
    Plan,
    Table,
    backward,
    build,
    choose,
    forward,
)

SHAPE = BlockShape(batch=1, length=128, hidden=768, heads=12, mlp=3072, layers=2)
BLOCKS = 48  # a picture of all 132 would show only more room
COLORS = {
    Forward.QKV: "#4477aa",
    Forward.ATTENTION: "#ee6677",
    Forward.ATTN_OUT: "#228833",
    Forward.MLP_IN: "#ccbb44",
    Forward.MLP_OUT: "#aa3377",
    Forward.MLP_SUM: "#555555",
}
NAMES = {
    Forward.QKV: "q, k, v",
    Forward.ATTENTION: "attention",
    Forward.ATTN_OUT: "output",
    Forward.MLP_IN: "MLP in",
    Forward.MLP_OUT: "MLP out, parts",
    Forward.MLP_SUM: "their sum, norm",
}
LEFT, TOP, WIDTH, ROW = 64, 48, 860, 9


class Tile(NamedTuple):
    item: Instruction
    block: int
    start: float
    end: float


def simulate(
    table: Table,
    plan: Plan | BackwardPlan,
    blocks: int,
    device: Device = Device(),  # noqa: B008 - immutable
    *,
    loops: int = 1,
) -> list[Tile]:
    """Tiles at modelled times: one starts when its block is free and its inputs are there.

    Only a block that waits the whole hand-over has weights of the tile ahead of it. Two blocks that share
    tiles count as one.
    """
    seconds = {
        (int(phase), behind_wait): cost.of_tile(behind_wait=behind_wait)
        for phase, cost in plan.phases.items()
        for behind_wait in (False, True)
    }
    free = [0.0] * blocks
    ready: dict[int, float] = defaultdict(float)  # counter -> when its last tile was complete
    tiles = []
    for number, item in enumerate(itertools.chain.from_iterable(itertools.repeat(table.loop, loops))):
        block = number % blocks
        inputs = max(ready[counter] for counter in range(item.wait, item.wait + item.wait_number))
        start = max(free[block], inputs + device.wait_seconds if inputs else 0.0)
        end = start + seconds[item.phase, free[block] <= inputs]
        free[block] = end
        ready[item.signal] = max(ready[item.signal], end)
        tiles.append(Tile(item, block, start, end))
    return tiles


def draw() -> str:
    plan = choose(SHAPE)
    table = build(SHAPE, plan.tiles)
    # Loop 0 waits for ENTER, which the picture leaves out; from there all loops look the same.
    tiles = simulate(table, plan, BLOCKS)
    scale = WIDTH / max(tile.end for tile in tiles)
    height = TOP + BLOCKS * ROW + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 16}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, (phase, color) in enumerate(COLORS.items()):
        x = LEFT + 110 * place
        lines.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{color}"/>')
        lines.append(f'<text x="{x + 18}" y="25">{NAMES[phase]}</text>')
    for tile in tiles:
        x, width = LEFT + tile.start * scale, (tile.end - tile.start) * scale
        shade = 1.0 if tile.item.layer == 0 else 0.6
        lines.append(
            f'<rect x="{x:.1f}" y="{TOP + tile.block * ROW}" width="{width:.1f}" height="{ROW - 1}" '
            f'fill="{COLORS[Forward(tile.item.phase)]}" fill-opacity="{shade}"/>'
        )
    bottom = TOP + BLOCKS * ROW
    for block in range(0, BLOCKS, 8):
        lines.append(f'<text x="8" y="{TOP + block * ROW + 9}">block {block}</text>')
    for time in range(0, int(1e6 * WIDTH / scale) + 1, 5):
        x = LEFT + 1e-6 * time * scale
        lines.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="black"/>')
        lines.append(f'<text x="{x - 6:.1f}" y="{bottom + 20}">{time} µs</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def table_of(phases: Sequence[Phase]) -> str:
    """Phases as the documents list them."""
    rows = ["| phase | waits for | a tile does | reads | writes |", "|---|---|---|---|---|"]
    for phase in phases:
        cells = [phase.name.name, waits(phase, phases), phase.does]
        for regions in (phase.reads, phase.writes):
            cells.append(", ".join(dict.fromkeys(region.buffer for region in regions)))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def waits(phase: Phase, phases: Sequence[Phase]) -> str:
    """Whose tiles raise the counters that a phase waits for."""
    waited = phase.waits_for
    if not waited.phases:
        return ""
    before = " of the layer before" if waited.layer else ""
    names = [" or ".join(name.name for name in waited.phases) + before]
    for other in phases:
        if other.cost and other.signals and set(other.signals.phases) & set(waited.phases):
            names.append(other.name.name + (" of the layer above" if other.signals.layer else ""))
    rows = {"same": "same rows", "every": "all rows of the sequence", "all": "all rows"}[waited.rows]
    return f"{', '.join(names)}; {rows}"


if __name__ == "__main__":
    write_file(*arguments(__doc__, "picture"), draw())
    print(table_of(forward.PHASES), table_of(backward.PHASES), sep="\n")
