"""The instruction table: its words, its counters and the order in which blocks execute it.

An instruction computes one tile of one phase for one sequence. The table has three parts: `enter` runs once,
`loop` runs in every loop, `leave` runs once for each sequence after its last loop. Numbering the instructions
enter, loop 0, loop 1, ..., leave gives one sequence of positions; of G thread blocks, block g executes
numbers g, g + G, g + 2G, ... of each of these parts, in this order: the same ones in every loop, so that it
can keep their weights. The table does not depend on G or on S.

A counter only ever grows. It belongs to one (phase, layer, sequence, row tile), and every loop adds the same
amount to it. An instruction of loop k may start when each of the counters it waits for has reached
count * (k + 1): all tiles of the phase before it, of this loop, are complete (a generation number, so nothing
is reset and nothing can be mistaken for an earlier round).

With early exit, `EXIT` opens each loop: from what the loop before has left it decides whether the sequence
goes on, and publishes that by raising the sequence's `progress` counter, to k + 1 if loop k runs and to
`FINAL` once the number of loops is settled. EXIT waits for progress k, the others for k + 1; after that they
do nothing if their sequence has stopped. LEAVE waits for `FINAL`. A sequence touches no counter and no buffer
row of another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Phase(IntEnum):
    ENTER = 0  # copy x into the stream, with the row statistics of the first norm
    QKV = 1  # norm, modulation, projection to q, k, v; rotary
    ATTENTION = 2
    ATTN_OUT = 3  # projection, gate, residual; row statistics of the second norm
    MLP_IN = 4  # norm, modulation, projection, bias, GELU
    MLP_OUT = (
        5  # projection, bias, gate, residual; row statistics of the next norm; or a part of the projection
    )
    MLP_SUM = 6  # where MLP_OUT has parts: their sum, and what else MLP_OUT does
    EXIT = 7  # decide from input and output of the loop before whether the sequence goes on
    LEAVE = 8  # copy the stream to the output


FINAL = 0x7F7F7F7F  # progress of a sequence whose number of loops is settled
LAYER_PHASES = (Phase.QKV, Phase.ATTENTION, Phase.ATTN_OUT, Phase.MLP_IN, Phase.MLP_OUT, Phase.MLP_SUM)


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


class Tiles(NamedTuple):
    """Tile sizes: rows (tokens) of every phase, columns of each product, heads of an attention tile.

    The inner dimension of MLP_OUT may be cut into parts, so that few tokens give more tiles.
    """

    rows: int
    qkv: int
    attn_out: int
    mlp_in: int
    mlp_out: int
    heads: int = 1
    mlp_out_parts: int = 1


class Instruction(NamedTuple):
    """Thirteen int32 words, as the device reads them."""

    phase: int
    layer: int
    sequence: int
    row: int  # row tile of the sequence
    column: int  # column tile, or head tile in ATTENTION
    wait: int  # first counter waited for; -1: none
    wait_number: int  # how many counters from there
    wait_count: int  # what each loop adds to each of them
    signal: int  # counter raised when the tile is complete; -1: none
    signal_count: int
    read_slot: int  # which half of a double buffer, in loop 0; see `stream_slot` and `qkv_slot`
    write_slot: int
    part: int = 0  # of the inner dimension


WORDS = len(Instruction._fields)


class Table(NamedTuple):
    shape: BlockShape
    tiles: Tiles
    adaptive: bool  # has EXIT instructions
    enter: tuple[Instruction, ...]
    loop: tuple[Instruction, ...]
    leave: tuple[Instruction, ...]

    @property
    def row_tiles(self) -> int:
        return -(-self.shape.length // self.tiles.rows)

    @property
    def layer_phases(self) -> tuple[Phase, ...]:
        return LAYER_PHASES if self.tiles.mlp_out_parts > 1 else LAYER_PHASES[:-1]

    @property
    def num_counters(self) -> int:
        return self.shape.layers * len(self.layer_phases) * self.shape.batch * self.row_tiles

    def counter(self, phase: Phase, layer: int, sequence: int, row: int) -> int:
        """Number of the counter that the tiles of a phase raise."""
        stage = layer * len(self.layer_phases) + self.layer_phases.index(phase)
        return (stage * self.shape.batch + sequence) * self.row_tiles + row

    def encode(self) -> Tensor:
        """All instructions in order, int32 [enter + loop + leave, 13]."""
        return torch.tensor([*self.enter, *self.loop, *self.leave], dtype=torch.int32)

    def position(self, number: int, loops: int) -> tuple[int, Instruction | None]:
        """(loop, instruction) at a place of the sequence of positions; beyond its end (loops, None).

        ENTER counts as loop -1, so that what it adds to a counter is the generation that loop 0 waits for.
        LEAVE counts as the loop after the last: its sequence's own number of loops.
        """
        if number < len(self.enter):
            return -1, self.enter[number]
        number -= len(self.enter)
        loop, index = divmod(number, len(self.loop))
        if loop < loops:
            return loop, self.loop[index]
        number -= loops * len(self.loop)
        return loops, self.leave[number] if number < len(self.leave) else None

    def share(self, block: int, num_blocks: int, loops: int) -> Iterator[tuple[int, Instruction]]:
        """What a thread block executes, with loops as `position` gives them."""
        for items, runs in ((self.enter, [-1]), (self.loop, range(loops)), (self.leave, [loops])):
            for loop in runs:
                for item in items[block::num_blocks]:
                    yield loop, item


def stream_slot(slot: int, loop: int) -> int:
    """Half of the stream's double buffer: loop k reads the half that loop k - 1 has written."""
    return (slot + loop) & 1


def qkv_slot(slot: int, loop: int, layers: int) -> int:
    """Half of the buffer of q, k and v: the application of a layer and the one before use different ones."""
    return (slot + loop * layers) & 1
