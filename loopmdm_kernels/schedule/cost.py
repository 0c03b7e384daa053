"""What phases cost by a model of the GPU's limits: arithmetic, L2 traffic, waiting.

A phase is `waves` rounds of equal tiles. A tile takes the longer of its arithmetic, at the SM's share of the
device's rate, and of its operands' way from L2, at the rate that the SMs at work leave each other. Between
phases lies one wait for counters. Weights do not wait: those of as many steps as the ring has stages are
asked for when it begins, ahead of the rows, and what comes meanwhile does not come later. Operands of
products are read from shared memory at its rate; where rows go one behind the other, each waits for L2.
The rates are assumptions until they are measured on the device; a plan is a ranking of tiles first and a
time second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple

from loopmdm_kernels.schedule.device import Device
from loopmdm_kernels.schedule.table import BlockShape, Phase, Table, Work

ALONE_COLUMNS = 128  # of a tile of 64 rows that one group of warps has; see config_sm90.cuh
STEP = 64  # of the inner dimension, per stage of the ring: 128 bytes of bf16, one swizzle row
KEY_BLOCKS = (64, 128)  # keys that one step of the attention meets


class Way(NamedTuple):
    """Seconds through one SM's port, or out of L2 at the rate that the SMs at work leave each other."""

    tile: float  # all of a tile's operands
    step: float  # the weights of one of its steps


class PhaseCost(NamedTuple):
    tiles: int
    waves: int
    arithmetic: float  # seconds, of all waves
    ways: tuple[Way, Way]
    bytes: float  # moved from L2 by all tiles
    steps: int  # of a tile
    ahead: float = 0.0  # of the first wave's steps those whose weights come within the wait before the phase
    late: float = 0.0  # seconds that rows come later, behind weights for which the wait was too short
    trip: float = 0.0  # seconds of a load from L2 that others wait for
    trips: int = 0  # of those in a tile

    @property
    def traffic(self) -> float:
        """Seconds of loading that follow the wait."""
        port, l2 = (self.waves * way.tile - self.ahead * way.step for way in self.ways)
        return max(port, l2)

    @property
    def seconds(self) -> float:
        waited = max(0, self.waves * self.trips - 1) * self.trip  # the hand-over has the first one
        return max(self.late + self.arithmetic, self.traffic) + waited

    def after(self, wait: float, stages: int) -> PhaseCost:
        """Behind a wait in which the weights of the first `stages` steps are on their way."""
        step = max(self.ways[0].step, self.ways[1].step)
        if not step:
            return self
        steps = min(self.steps, stages)
        return self._replace(ahead=min(steps, wait / step), late=max(0.0, steps * step - wait))

    def of_tile(self, *, behind_wait: bool) -> float:
        """Seconds of one tile, of the first wave or a later one."""
        tile = self._replace(waves=1, arithmetic=self.arithmetic / self.waves)
        later = tile._replace(ahead=0.0, late=0.0)
        return tile.seconds if behind_wait else later.seconds + (self.trip if self.trips else 0.0)


def costs(phases: Iterable[Phase], shape: BlockShape, tiles: Any, device: Device) -> dict[IntEnum, PhaseCost]:
    """Of the phases of one layer, nothing ahead of a wait."""
    table = Table(shape, tiles, tuple(phases))
    return {phase.name: _cost(table, phase, device) for phase in table.phases if phase.cost}


def _cost(table: Table, phase: Phase, device: Device) -> PhaseCost:
    assert phase.cost is not None
    work, tiles, blocks = phase.cost(table.shape, table.tiles), phase.number(table), table.tiles.blocks
    seconds = work.flops / (device.attention_flops if work.attention else device.product_flops)
    seconds *= device.head_alone if work.alone else 1.0
    workers = device.clusters(blocks)
    waves = math.ceil(tiles / workers)  # of tiles whose arithmetic is the whole device's
    # Tiles of a weight's gradient are in a row with those of others, which keep L2 as busy.
    at_work = workers if phase.rows is not None else min(tiles, workers)
    sent = work.bytes + (device.multicast_cost - 1) * work.shared
    received = (work.bytes + work.shared) / blocks
    weights, copies = work.weights / work.steps, device.multicast_cost if blocks > 1 else 1.0
    port = Way(received / device.sm_bytes, weights / sides(table.tiles) / device.sm_bytes)
    l2 = Way(sent * at_work / device.l2_bytes, weights * copies * at_work / device.l2_bytes)
    busy = max(seconds * device.sms / blocks, work.shared_read / device.shared_read_bytes)
    cost = PhaseCost(tiles, waves, waves * busy, (port, l2), tiles * sent, work.steps)
    return cost._replace(trip=device.load_seconds, trips=work.trips)


def product_work(
    shape: BlockShape, tiles: Any, columns: int, inner: int, *, left_bytes: int = 2, written: int = 0
) -> Work:
    """Of a tile of rows times weights. Rows beyond the sequence cost arithmetic and are not moved.

    Each of the blocks that share rows is taken for the one with more of them.
    """
    weights = 2 * columns * inner
    rows = row_blocks(tiles) * min(block_rows(tiles), shape.length)
    left = inner * left_bytes * rows
    # Two groups of warps have rows of their own and all columns, or half of the columns and all rows.
    own = columns // sides(tiles)
    groups = 1 if of_one_group(tiles, own) else 2
    read = 64 * groups * left_bytes + 2 * own * block_rows(tiles) // 64
    return Work(
        2 * tiles.rows * columns * inner, left + weights + written,
        shared=shared_bytes(tiles, weights) + (left if sides(tiles) > 1 else 0),
        weights=weights, steps=inner // STEP, shared_read=inner * read,
    )  # fmt: skip


def row_blocks(tiles: Any) -> int:
    """Blocks that share the rows of a tile."""
    return min(2, int(tiles.blocks))


def sides(tiles: Any) -> int:
    """Blocks that share its columns, and its heads."""
    return int(tiles.blocks) // row_blocks(tiles)


def block_rows(tiles: Any) -> int:
    return int(tiles.rows) // row_blocks(tiles)


def of_one_group(tiles: Any, columns: int) -> bool:
    """Whether one group of warps has all of a product's columns of a block."""
    return block_rows(tiles) == 64 and columns <= ALONE_COLUMNS


def shared_bytes(tiles: Any, number: int) -> int:
    """Of so many bytes of right operands those that two blocks get."""
    return number if tiles.blocks > 1 else 0


def attention_work(shape: BlockShape, tiles: Any) -> Work:
    block = key_block(shape, tiles)
    keys = block * math.ceil(shape.length / block)
    width = tiles.heads * shape.head_dim
    read = 4 * width * shape.length
    return Work(
        4.0 * tiles.rows * keys * width, 2 * width * tiles.rows + read, attention=True,
        alone=block_rows(tiles) == 64 and tiles.heads == sides(tiles), shared=shared_bytes(tiles, read),
    )  # fmt: skip


def key_block(shape: BlockShape, tiles: Any) -> int:
    """Few keys are one small block. Those that a block has too many weigh nothing: the bits are the same."""
    small, large = KEY_BLOCKS
    return small if shape.length <= small and tiles.rows <= small else large
