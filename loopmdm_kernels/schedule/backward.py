"""The instruction table of the backward pass: its phases, its counters and how it is made.

Step j of the backward pass belongs to loop S - 1 - j. It runs that loop again from its input, which the
forward pass has kept, leaves a record of every layer, and goes back through the layers: the gradient of the
stream is updated in place, those of weights are added to fp32 sums that live for all steps.

As in the forward table (schedule/table.py) an instruction is one tile of one phase, counters only grow, and
an instruction of step j waits until its counters have reached count * (j + 1). Two things differ. A tile of
a weight gradient sums over the tokens of all sequences and waits for all of them. And each step begins when
the one before is complete: the counter `done` gets a signal from all that nobody else waits for, and starts
as if a step before the first had ended. Because of this one meeting of all blocks in a step, a record needs
one place for each layer, whatever S is.

Work that goes through whole rows (norms, sums over rows) is divided into parts of a row tile, so that there
are as many tiles of it as of the products.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.schedule.table import BlockShape, Instruction


class BackwardPhase(IntEnum):
    # The loop again, with a record.
    NORM1 = 0  # norm and modulation, rounded
    QKV = 1
    ATTENTION = 2  # also log-sum-exp
    ATTN_OUT = 3  # branch; stream after it
    NORM2 = 4
    MLP_IN = 5  # before and after GELU
    MLP_OUT = 6  # branch; stream after it
    # Gradients, from the last layer down.
    TOP = 7  # gate of the last layer's MLP branch
    GRAD_WIDE = 8  # of what GELU was applied to
    GRAD_NORM2 = 9  # of the normalised rows
    MIDDLE = 10  # second norm; gate of the attention branch
    GRAD_MIXED = 11  # of attention's output; its product with that output
    GRAD_QUERIES = 12
    GRAD_KEYS = 13  # and values
    GRAD_NORM1 = 14
    BOTTOM = 15  # first norm; gate of the MLP branch of the layer below
    WEIGHT_MLP_OUT = 16
    WEIGHT_MLP_IN = 17
    WEIGHT_ATTN_OUT = 18
    WEIGHT_QKV = 19


P = BackwardPhase
WEIGHT_PHASES = (P.WEIGHT_MLP_OUT, P.WEIGHT_MLP_IN, P.WEIGHT_ATTN_OUT, P.WEIGHT_QKV)
ROW_PHASES = (P.NORM1, P.NORM2, P.TOP, P.MIDDLE, P.BOTTOM)
# Phases that own counters. GRAD_KEYS raises those of GRAD_QUERIES, BOTTOM those of TOP one layer below.
COUNTED = (
    P.NORM1, P.QKV, P.ATTENTION, P.ATTN_OUT, P.NORM2, P.MLP_IN, P.MLP_OUT,
    P.TOP, P.GRAD_WIDE, P.GRAD_NORM2, P.MIDDLE, P.GRAD_MIXED, P.GRAD_QUERIES, P.GRAD_NORM1,
)  # fmt: skip


class BackwardTiles(NamedTuple):
    rows: int  # tokens of a tile; of a weight gradient its rows
    columns: int  # of every product
    part: int  # rows of a tile that go through norms together


class BackwardTable(NamedTuple):
    shape: BlockShape
    tiles: BackwardTiles
    loop: tuple[Instruction, ...]

    @property
    def row_tiles(self) -> int:
        return -(-self.shape.length // self.tiles.rows)

    @property
    def parts(self) -> int:
        """Of a row tile."""
        return self.tiles.rows // self.tiles.part

    @property
    def done(self) -> int:
        """Number of the last counter."""
        return self.shape.layers * len(COUNTED) * self.shape.batch * self.row_tiles

    @property
    def done_count(self) -> int:
        """What a step adds to it."""
        weights = sum(item.phase in WEIGHT_PHASES for item in self.loop)
        return weights + self.shape.batch * self.row_tiles * self.parts

    def initial_counters(self) -> list[int]:
        return [0] * self.done + [self.done_count]

    def counter(self, phase: BackwardPhase, layer: int, sequence: int, row: int) -> int:
        stage = layer * len(COUNTED) + COUNTED.index(phase)
        return (stage * self.shape.batch + sequence) * self.row_tiles + row

    def encode(self) -> Tensor:
        """All instructions in order, int32 [instructions, 12]."""
        return torch.tensor(self.loop, dtype=torch.int32)

    def position(self, number: int, steps: int) -> tuple[int, Instruction | None]:
        """(step, instruction) at a place of the sequence of positions; beyond its end (steps, None)."""
        step, index = divmod(number, len(self.loop))
        return (step, self.loop[index]) if step < steps else (steps, None)


def weight_sizes(shape: BlockShape) -> dict[BackwardPhase, tuple[int, int]]:
    """(out, in) of the matrix whose gradient a phase sums."""
    return {
        P.WEIGHT_MLP_OUT: (shape.hidden, shape.mlp),
        P.WEIGHT_MLP_IN: (shape.mlp, shape.hidden),
        P.WEIGHT_ATTN_OUT: (shape.hidden, shape.hidden),
        P.WEIGHT_QKV: (3 * shape.hidden, shape.hidden),
    }


def build_backward(shape: BlockShape, tiles: BackwardTiles) -> BackwardTable:
    """The table of a shape. Neither the number of thread blocks nor that of loops is part of it.

    Raises:
        ValueError: a width is no multiple of its tile.
    """
    _check(shape, tiles)
    table = BackwardTable(shape, tiles, ())
    wide, narrow = shape.mlp // tiles.columns, shape.hidden // tiles.columns
    every_row, everything = table.row_tiles, shape.batch * table.row_tiles
    number = dict.fromkeys(ROW_PHASES, table.parts)
    number |= {P.QKV: 3 * narrow, P.ATTENTION: shape.heads, P.ATTN_OUT: narrow, P.MLP_IN: wide}
    number |= {P.MLP_OUT: narrow, P.GRAD_WIDE: wide, P.GRAD_NORM2: narrow, P.GRAD_MIXED: narrow}
    number |= {P.GRAD_QUERIES: shape.heads, P.GRAD_KEYS: shape.heads, P.GRAD_NORM1: narrow}
    number |= {
        phase: -(-height // tiles.rows) * (width // tiles.columns)
        for phase, (height, width) in weight_sizes(shape).items()
    }
    added = {**number, P.GRAD_QUERIES: 2 * shape.heads}
    # What a phase waits for, and of how many row tiles; the layer of both is the same.
    before = {
        P.QKV: (P.NORM1, 1),
        P.ATTENTION: (P.QKV, every_row),
        P.ATTN_OUT: (P.ATTENTION, 1),
        P.NORM2: (P.ATTN_OUT, 1),
        P.MLP_IN: (P.NORM2, 1),
        P.MLP_OUT: (P.MLP_IN, 1),
        P.TOP: (P.MLP_OUT, 1),
        P.GRAD_WIDE: (P.TOP, 1),
        P.GRAD_NORM2: (P.GRAD_WIDE, 1),
        P.MIDDLE: (P.GRAD_NORM2, 1),
        P.GRAD_MIXED: (P.MIDDLE, 1),
        P.GRAD_QUERIES: (P.GRAD_MIXED, 1),
        P.GRAD_KEYS: (P.GRAD_MIXED, every_row),
        P.GRAD_NORM1: (P.GRAD_QUERIES, 1),
        P.BOTTOM: (P.GRAD_NORM1, 1),
        P.WEIGHT_MLP_OUT: (P.TOP, everything),
        P.WEIGHT_MLP_IN: (P.GRAD_WIDE, everything),
        P.WEIGHT_ATTN_OUT: (P.MIDDLE, everything),
        P.WEIGHT_QKV: (P.GRAD_QUERIES, everything),
    }

    def wait(phase: BackwardPhase, layer: int, sequence: int, row: int) -> tuple[int, int, int]:
        if phase is P.NORM1 and layer == 0:
            return table.done, 1, added_when_done
        earlier, rows = (P.MLP_OUT, 1) if phase is P.NORM1 else before[phase]
        of_layer = layer - 1 if phase is P.NORM1 else layer
        if phase in WEIGHT_PHASES or rows > 1:
            row = 0  # the first of all; that of a weight gradient's tile is none of the tokens
        return table.counter(earlier, of_layer, sequence, row), rows, added[earlier]

    def signal(phase: BackwardPhase, layer: int, sequence: int, row: int) -> int:
        if phase in WEIGHT_PHASES or (phase is P.BOTTOM and layer == 0):
            return table.done
        if phase is P.BOTTOM:
            return table.counter(P.TOP, layer - 1, sequence, row)
        return table.counter(P.GRAD_QUERIES if phase is P.GRAD_KEYS else phase, layer, sequence, row)

    def tile(phase: BackwardPhase, layer: int, sequence: int, row: int, column: int) -> Instruction:
        signalled = signal(phase, layer, sequence, row)
        waited = wait(phase, layer, sequence, row)
        return Instruction(phase, layer, sequence, row, column, *waited, signalled, 1, 0, 0)

    places = [(sequence, row) for sequence in range(shape.batch) for row in range(every_row)]

    def tiles_of(phase: BackwardPhase, layer: int) -> list[Instruction]:
        if phase in WEIGHT_PHASES:
            height, width = weight_sizes(shape)[phase]
            return [
                tile(phase, layer, 0, row, column)
                for row in range(-(-height // tiles.rows))
                for column in range(width // tiles.columns)
            ]
        return [tile(phase, layer, *place, column) for place in places for column in range(number[phase])]

    added_when_done = shape.layers * sum(number[phase] for phase in WEIGHT_PHASES) + everything * table.parts
    order = [(phase, layer) for layer in range(shape.layers) for phase in P if phase <= P.MLP_OUT]
    for layer in reversed(range(shape.layers)):
        if layer == shape.layers - 1:
            order.append((P.TOP, layer))
        # A weight gradient comes behind the phase that follows its operands: it fills the blocks that this
        # leaves idle, and does not hold it up.
        order += [
            (phase, layer)
            for phase in (
                P.GRAD_WIDE, P.WEIGHT_MLP_OUT, P.GRAD_NORM2, P.WEIGHT_MLP_IN, P.MIDDLE, P.GRAD_MIXED,
                P.WEIGHT_ATTN_OUT, P.GRAD_QUERIES, P.GRAD_KEYS, P.GRAD_NORM1, P.WEIGHT_QKV, P.BOTTOM,
            )
        ]  # fmt: skip
    loop = [item for phase, layer in order for item in tiles_of(phase, layer)]
    return table._replace(loop=tuple(loop))


def _check(shape: BlockShape, tiles: BackwardTiles) -> None:
    for name, value in (*shape._asdict().items(), *tiles._asdict().items()):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    for name, width in (("hidden", shape.hidden), ("mlp", shape.mlp)):
        if width % tiles.columns:
            raise ValueError(f"tiles.columns: got {tiles.columns}, expected a divisor of {name} {width}")
    if tiles.columns % shape.head_dim:
        raise ValueError(
            f"tiles.columns: got {tiles.columns}, expected a multiple of the head size {shape.head_dim}"
        )
    if tiles.rows % tiles.part:
        raise ValueError(f"tiles.part: got {tiles.part}, expected a divisor of tiles.rows {tiles.rows}")
