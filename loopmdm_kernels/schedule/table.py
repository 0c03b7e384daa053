"""The instruction table: its words, its phases and counters, and how it is made of them.

An instruction computes one tile of one phase. The table has three parts: `enter` runs once, `loop` runs in
every loop, `leave` runs once for each sequence after its last loop. Numbering the instructions enter, loop 0,
loop 1, ..., leave gives one sequence of positions; of G thread blocks, block g executes numbers g, g + G,
g + 2G, ..., in this order. The table does not depend on G or on S. Two blocks that share tiles count as one
here.

A counter only ever grows. It belongs to one (phase, layer, sequence, row tile), and every loop adds the same
amount to it. An instruction of loop k may start when each of the counters it waits for has reached
count * (k + 1): all tiles of the phase before it, of this loop, are complete (a generation number, so nothing
is reset and nothing can be mistaken for an earlier round).

With early exit, `EXIT` opens each loop: from what the loop before has left it decides whether the sequence
goes on, and publishes that by raising the sequence's `progress` counter, to k + 1 if loop k runs and to
`FINAL` once the number of loops is settled. EXIT waits for progress k, the others for k + 1; after that they
do nothing if their sequence has stopped. LEAVE waits for `FINAL`. A sequence touches no counter and no buffer
row of another one.

Where loops meet, as the steps of the backward pass do, each begins when the one before is complete: the last
counter, `done`, gets a signal from all that nobody else waits for, and starts as if a step before the first
had ended.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

FINAL = 0x7F7F7F7F  # progress of a sequence whose number of loops is settled


class BlockShape(NamedTuple):
    """Sizes of a call, in the letters of docs/notation.md: B, L, D, H, F, n."""

    batch: int
    length: int
    hidden: int
    heads: int
    mlp: int
    layers: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Instruction(NamedTuple):
    """Thirteen int32 words, as the device reads them."""

    phase: int
    layer: int
    sequence: int
    row: int  # row tile of the sequence; of a weight gradient its own
    column: int  # column tile, head tile or part of the row tile
    wait: int  # first counter waited for; -1: none
    wait_number: int  # how many counters from there
    wait_count: int  # what each loop adds to each of them
    signal: int  # counter raised when the tile is complete; -1: none
    signal_count: int
    read_slot: int  # which half of a double buffer, in loop 0; see `stream_slot` and `qkv_slot`
    write_slot: int
    part: int = 0  # of the inner dimension


class Counters(NamedTuple):
    """Counters of the first of these phases that the table has; of none: `done`, where loops meet."""

    phases: tuple[IntEnum, ...] = ()
    rows: Literal["same", "every", "all"] = "same"  # row tile; every one of the sequence; of all sequences
    layer: int = 0  # relative; before the first comes the last of the loop before, or `done`


RegionRows = Literal["own", "every", "part", "all", "once", "weight"]


class Region(NamedTuple):
    """What a tile touches of a buffer."""

    buffer: str
    # The buffer's own width; columns of the tile; its number; numbers of its heads; its part of the inner
    # dimension; columns that are the tile's rows.
    columns: Literal["whole", "tile", "number", "heads", "inner", "rows"] = "whole"
    # The tile's; every one of the sequence; its part of the row tile; those of all sequences; one for a
    # sequence; one for a row tile of a weight.
    rows: RegionRows = "own"
    offset: int = 0  # of the columns, in D
    layer: int = 0  # relative
    exits: bool = False  # only in the last layer, where sequences may exit


class Work(NamedTuple):
    """What a tile takes."""

    flops: float
    bytes: int  # moved
    attention: bool = False  # its flops are at attention's rate
    alone: bool = False  # of one head, by one group of warps: no other one multiplies beside its exponentials
    shared: int = 0  # bytes that two of a tile's blocks get; the others are divided among them
    weights: int = 0  # bytes of a product's weights, which wait for no counter
    steps: int = 1  # stages that they come in
    shared_read: int = 0  # bytes of operands that the groups of warps read from shared memory
    trips: int = 0  # loads from L2 one behind the other; 0: they are pipelined


Sizes = Callable[[BlockShape, Any], tuple[int, int]]
Cost = Callable[[BlockShape, Any], Work]


class Phase(NamedTuple):
    """One kind of tile. Functions of sizes get the shape and the tiles."""

    name: IntEnum
    does: str
    waits_for: Counters
    columns: Sizes = lambda shape, tiles: (1, 1)  # all, and of a tile
    cost: Cost | None = None
    rows: Callable[[BlockShape], int] | None = None  # of a weight's gradient, instead of the tokens
    once: bool = False  # for a sequence, not for each row tile
    parts: Callable[[Any], int] = lambda tiles: 1  # of the inner dimension
    signals: Counters | None = None  # None: its own
    slots: Callable[[int], tuple[int, int]] = lambda layer: (0, 0)  # read and write, by layer
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()

    def places(self, table: Table) -> list[tuple[int, int]]:
        """(sequence, row tile) of its tiles."""
        batch, rows = table.shape.batch, table.row_tiles
        if self.rows is not None:
            batch, rows = 1, math.ceil(self.rows(table.shape) / table.tiles.rows)
        return [(sequence, row) for sequence in range(batch) for row in range(1 if self.once else rows)]

    def across(self, table: Table) -> tuple[int, int]:
        """Parts and columns of the tiles of one place."""
        width, tile = self.columns(table.shape, table.tiles)
        return self.parts(table.tiles), -(-width // tile)

    def number(self, table: Table) -> int:
        """Of its tiles in a layer."""
        (parts, columns), places = self.across(table), table.shape.batch
        if self.rows is not None:
            places = math.ceil(self.rows(table.shape) / table.tiles.rows)
        elif not self.once:
            places *= table.row_tiles
        return parts * columns * places


class Table(NamedTuple):
    shape: BlockShape
    tiles: Any  # Tiles or BackwardTiles
    phases: tuple[Phase, ...]
    adaptive: bool = False  # has EXIT instructions
    meets: bool = False  # a loop begins when the one before is complete
    enter: tuple[Instruction, ...] = ()
    loop: tuple[Instruction, ...] = ()
    leave: tuple[Instruction, ...] = ()

    @property
    def row_tiles(self) -> int:
        rows: int = self.tiles.rows
        return math.ceil(self.shape.length / rows)

    @property
    def counted(self) -> list[IntEnum]:
        """Phases that have counters of their own."""
        return [phase.name for phase in self.phases if phase.signals is None]

    @property
    def num_counters(self) -> int:
        """Without `done`, which comes next."""
        return self.shape.layers * len(self.counted) * self.shape.batch * self.row_tiles

    def initial_counters(self) -> list[int]:
        done = self.num_counters
        number = sum(item.signal_count for item in self.loop if item.signal == done)
        return [0] * done + [number] * self.meets

    def counter(self, phase: IntEnum, layer: int, sequence: int, row: int) -> int:
        """Number of the counter that the tiles of a phase raise."""
        stage = layer * len(self.counted) + self.counted.index(phase)
        return (stage * self.shape.batch + sequence) * self.row_tiles + row

    def encode(self) -> Tensor:
        """All instructions in order, int32 [enter + loop + leave, 13]."""
        return torch.tensor([*self.enter, *self.loop, *self.leave], dtype=torch.int32)

    def made(
        self,
        order: Iterable[tuple[Phase, int]],
        enter: Iterable[tuple[Phase, int]] = (),
        leave: Iterable[tuple[Phase, int]] = (),
    ) -> Table:
        """With the instructions of phases and layers in this order."""
        loop = [item for phase, layer in order for item in self._items(phase, layer)]
        adds = Counter(item.signal for item in loop)  # to each counter, in a loop

        def counted(items: Iterable[Instruction], *, signals_all: bool = False) -> tuple[Instruction, ...]:
            return tuple(
                Instruction(
                    *item[:7], adds[item.wait] if item.wait >= 0 else 0,
                    item.signal, adds[item.signal] if signals_all else item.signal_count, *item[10:],
                )
                for item in items
            )  # fmt: skip

        return self._replace(
            enter=counted((i for at in enter for i in self._items(*at)), signals_all=True),
            loop=counted(loop),
            leave=counted(i for at in leave for i in self._items(*at)),
        )

    def _items(self, phase: Phase, layer: int) -> Iterator[Instruction]:
        """The tiles of a phase, which do not know yet what their counters will count."""
        own = Counters((phase.name,))
        (parts, columns), slots = phase.across(self), phase.slots(layer)
        for sequence, row in phase.places(self):
            wait, waits = self._counters(phase.waits_for, layer, sequence, row)
            signal, signals = self._counters(phase.signals or own, layer, sequence, row)
            for part, column in itertools.product(range(parts), range(columns)):
                yield Instruction(
                    phase.name, layer, sequence, row, column, wait, waits, 0, signal, signals, *slots, part
                )

    def _counters(self, counters: Counters, layer: int, sequence: int, row: int) -> tuple[int, int]:
        """The first of them and their number; (-1, 0): there are none."""
        layer += counters.layer
        if self.meets and (layer < 0 or not counters.phases):
            return self.num_counters, 1
        there = [name for name in counters.phases if name in self.counted]
        if not there:
            return -1, 0
        row = row if counters.rows == "same" else 0
        number = {"same": 1, "every": self.row_tiles, "all": self.row_tiles * self.shape.batch}
        return self.counter(there[0], layer % self.shape.layers, sequence, row), number[counters.rows]


def check_sizes(**sizes: int) -> None:
    """Raises ValueError if one is not positive."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")


def stream_slot(slot: int, loop: int) -> int:
    """Half of the stream's double buffer: loop k reads the half that loop k - 1 has written."""
    return (slot + loop) & 1


def qkv_slot(slot: int, loop: int, layers: int) -> int:
    """Half of the buffer of q, k and v: the application of a layer and the one before use different ones."""
    return (slot + loop * layers) & 1
