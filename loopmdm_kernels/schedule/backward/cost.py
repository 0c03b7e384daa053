"""Picks the tiles of the backward pass by the model of schedule/cost.py."""

from __future__ import annotations

from typing import NamedTuple

from loopmdm_kernels.schedule.backward.table import (
    WEIGHT_PHASES,
    BackwardPhase,
    BackwardTiles,
    P,
    weight_sizes,
)
from loopmdm_kernels.schedule.cost import (
    COLUMN_TILES,
    FIXED_BYTES,
    MAX_STAGES,
    STEP,
    Device,
    PhaseCost,
    phase_cost,
)
from loopmdm_kernels.schedule.table import BlockShape

KEY_BLOCK = 128  # keys of a stage
ROWS, PART = 128, 16  # two warp groups of 64 rows; two rows a warp
# Bytes moved for each number of a row: norm to operand; gradient and branch; gradient, norm twice, branch.
_ROW_BYTES = {P.NORM1: 6, P.NORM2: 6, P.TOP: 8, P.MIDDLE: 28, P.BOTTOM: 28}
# Products of a tile of attention; what it reads of its own rows and of the others, in heads.
_ATTENTION = {P.ATTENTION: (2, 1, 2), P.GRAD_QUERIES: (3, 2, 2), P.GRAD_KEYS: (4, 2, 2)}


class BackwardPlan(NamedTuple):
    tiles: BackwardTiles
    stages: int
    stage_bytes: int
    kept_bytes: int  # operands of attention beside the ring
    phases: dict[BackwardPhase, PhaseCost]  # of one layer
    loop_seconds: float

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + self.kept_bytes + FIXED_BYTES


def choose_backward(shape: BlockShape, device: Device = Device()) -> BackwardPlan:  # noqa: B008 - immutable
    """The fastest plan by the model.

    Raises:
        ValueError: the tiles divide a width in no way.
    """
    fitting = [
        columns
        for columns in COLUMN_TILES
        if not (shape.hidden % columns or shape.mlp % columns or columns % shape.head_dim)
    ]
    if not fitting:
        raise ValueError(f"no tiles of {COLUMN_TILES} columns divide the widths of {shape} into whole heads")
    return min((_plan(shape, device, columns) for columns in fitting), key=lambda plan: plan.loop_seconds)


def _plan(shape: BlockShape, device: Device, columns: int) -> BackwardPlan:
    tiles = BackwardTiles(ROWS, columns, PART)
    row_tiles = shape.batch * -(-shape.length // ROWS)
    costs = {}
    for phase, size in _ROW_BYTES.items():
        count = row_tiles * (ROWS // PART)
        costs[phase] = phase_cost(device, count, 0.0, size * PART * shape.hidden)
    hidden, mlp = shape.hidden, shape.mlp
    for phase, width, inner in (
        (P.QKV, 3 * hidden, hidden), (P.ATTN_OUT, hidden, hidden), (P.MLP_IN, mlp, hidden),
        (P.MLP_OUT, hidden, mlp), (P.GRAD_WIDE, mlp, hidden), (P.GRAD_NORM2, hidden, mlp),
        (P.GRAD_MIXED, hidden, hidden), (P.GRAD_NORM1, hidden, 3 * hidden),
    ):  # fmt: skip
        costs[phase] = _product(device, row_tiles * (width // columns), columns, inner)
    tokens = shape.batch * STEP * -(-shape.length // STEP)
    for phase in WEIGHT_PHASES:
        height, width = weight_sizes(shape)[phase]
        costs[phase] = _product(device, -(-height // ROWS) * (width // columns), columns, tokens)
    keys = KEY_BLOCK * -(-shape.length // KEY_BLOCK)
    for phase, (products, own, others) in _ATTENTION.items():
        work = 2 * products * ROWS * keys * shape.head_dim / device.attention_flops
        moved = 2 * shape.head_dim * (own * ROWS + others * shape.length)
        costs[phase] = phase_cost(device, row_tiles * shape.heads, work, moved)
    stage = max(2 * STEP * (ROWS + columns), 2 * KEY_BLOCK * shape.head_dim)
    kept = 2 * 2 * ROWS * shape.head_dim
    # Weight gradients wait for nobody who does not wait for more.
    waits = len(costs) - len(WEIGHT_PHASES)
    return BackwardPlan(
        tiles,
        min(MAX_STAGES, (device.shared_bytes - FIXED_BYTES - kept) // stage),
        stage,
        kept,
        costs,
        shape.layers * (sum(cost.seconds for cost in costs.values()) + waits * device.wait_seconds),
    )


def _product(device: Device, tiles: int, columns: int, inner: int) -> PhaseCost:
    moved = 2 * inner * (ROWS + columns)
    return phase_cost(device, tiles, 2 * ROWS * columns * inner / device.product_flops, moved)
