"""Picks the tiles of a shape by what its phases cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

from loopmdm_kernels.schedule import backward
from loopmdm_kernels.schedule.backward import KEY_BLOCK, PART, BackwardTiles
from loopmdm_kernels.schedule.cost import (
    ALONE_COLUMNS,
    STEP,
    PhaseCost,
    block_rows,
    costs,
    key_block,
    sides,
)
from loopmdm_kernels.schedule.device import Device
from loopmdm_kernels.schedule.forward import MOST_SUMMED, Forward, Tiles, phases_of
from loopmdm_kernels.schedule.table import BlockShape

FIXED_BYTES = 2_048  # barriers and instructions, and the ring's alignment
MAX_STAGES = 8
ENOUGH_STAGES = 3  # with two a load has only one step of arithmetic to hide behind
ROW_TILES = (64, 128)
PAIR_ROWS = tuple(2 * rows for rows in ROW_TILES)  # of two blocks
# Where rows are normalised on their way into a product, in registers: two halves of 128 columns at most.
COLUMN_TILES = (64, 128, 192, 256)
HALF_TILES = (32, 64, 96, 128, 192, 256)  # of 64 rows: the first ones by one group of warps
WIDE_TILES = (64, 96, 128, 192, 256)  # where both operands come from shared memory; the last one for pairs
BACKWARD_TILES = (64, 128, 192, 256)  # columns; the last ones for pairs
# Batches that tiles are chosen for: a warm-up with these compiles all kernels of a length.
BATCHES = (1, 2, 4, 8, 512)
NORM_PARTS = (16, 32, 64, 128)  # rows that go through a norm together
SUM_ROWS = (1, 2, 4, 8, 16, 32)  # rows whose parts of MLP_OUT are added together
PARTS = (1, 2, 3, 4, 6, 8, 12)  # of MLP_OUT's inner dimension
# Columns of a group of warps that has registers for the sums of a part beside those of all; True: rows are
# normalised by phases of their own.
MOST_TWICE = {False: 96, True: 192}


class Plan(NamedTuple):
    tiles: Tiles
    stages: int
    stage_bytes: int
    key_block: int
    phases: dict[IntEnum, PhaseCost]  # of one layer
    loop_seconds: float
    limit_seconds: float  # the longest of arithmetic and traffic with all SMs busy, and of the waits alone

    @property
    def blocks(self) -> int:
        """Blocks that execute an instruction together."""
        return self.tiles.blocks

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + FIXED_BYTES


class BackwardPlan(NamedTuple):
    tiles: BackwardTiles
    stages: int
    stage_bytes: int
    kept_bytes: int  # operands of attention beside the ring
    phases: dict[IntEnum, PhaseCost]  # of one layer
    loop_seconds: float

    @property
    def blocks(self) -> int:
        """Blocks that execute an instruction together."""
        return self.tiles.blocks

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + self.kept_bytes + FIXED_BYTES


class _Rows(NamedTuple):
    """Rows of a tile, whether they are normalised by phases of their own, and how many blocks share it."""

    rows: int
    norms: bool
    blocks: int = 1

    @property
    def halves(self) -> int:
        """In which groups of warps may divide the columns, and the heads: with 64 rows a block."""
        return max(ROW_TILES) // block_rows(self)


class _Choice(NamedTuple):
    """A number that a field of `Tiles` may have."""

    tiles: Tiles
    stages: int  # that a block has room for, if no other tile is larger
    costs: list[PhaseCost]  # of the phases that depend on it

    def seconds(self, device: Device, stages: int) -> float:
        return sum(_behind_wait(cost, device, stages).seconds + device.wait_seconds for cost in self.costs)


class _Widths(NamedTuple):
    """What the fields of `Tiles` may be: columns of the products, heads of an attention tile."""

    qkv: tuple[int, ...]
    heads: tuple[int, ...]
    attn_out: tuple[int, ...]
    mlp_in: tuple[int, ...]
    mlp_out: tuple[int, ...]


_OF_WIDTHS = (Forward.QKV, Forward.ATTENTION, Forward.ATTN_OUT, Forward.MLP_IN, Forward.MLP_OUT)


def choose(
    shape: BlockShape,
    device: Device = Device(),  # noqa: B008 - immutable
    parts: int | None = None,
) -> Plan:
    """The fastest plan by the model, for the next of `BATCHES`: these are all kernels that a length has.

    Args:
        parts: of MLP_OUT, where another plan has decided about them.

    Raises:
        ValueError: the tiles divide a width in no way.
    """
    return plan_with(shape, device, _choose(tiled_batch(shape), device, parts).tiles)


def tiled_batch(shape: BlockShape) -> BlockShape:
    """What tiles are chosen for."""
    batch = next((number for number in BATCHES if number >= shape.batch), BATCHES[-1])
    return shape._replace(batch=batch)


def _choose(shape: BlockShape, device: Device, parts: int | None) -> Plan:
    fitting = {
        rows: widths for rows in _rows_of(shape, device) if all(widths := _widths(shape, device, rows))
    }
    if not fitting or shape.hidden % STEP or shape.mlp % STEP:
        raise ValueError(
            f"no tiles of {ROW_TILES} rows by {HALF_TILES} columns divide the widths of {shape}, which are "
            f"to be multiples of {STEP}; a tile of q, k and v holds whole heads"
        )
    plan = _fastest_of_all(shape, device, fitting, parts or _parts(shape, device, fitting))
    if plan.stages < 2:
        raise ValueError(
            f"two stages of {plan.stage_bytes} bytes do not fit the {device.shared_bytes} bytes of shared "
            f"memory that a block has here, for {shape}"
        )
    return plan


def _rows_of(shape: BlockShape, device: Device) -> list[_Rows]:
    found = [_Rows(rows, norms=False) for rows in ROW_TILES]
    if _has_wide_tiles(shape, device):
        found.append(_Rows(max(ROW_TILES), norms=True))
        if device.cluster > 1:
            few, many = PAIR_ROWS
            found += [_Rows(few, norms=False, blocks=2), _Rows(many, norms=True, blocks=2)]
        if device.cluster > 2:
            found.append(_Rows(few, norms=False, blocks=4))
    return found


def _has_wide_tiles(shape: BlockShape, device: Device) -> bool:
    """Heads of 128 take the registers that wide tiles, and loading for two, would need."""
    return device.has_wide_tiles and shape.head_dim <= 64


def _widths(shape: BlockShape, device: Device, tiles: _Rows) -> _Widths:
    wide, halves, among = _has_wide_tiles(shape, device), tiles.halves, sides(tiles)
    if tiles.norms:
        known = WIDE_TILES[: None if tiles.blocks > 1 else -1]
    elif wide and halves > 1:
        known = HALF_TILES
    else:
        known = COLUMN_TILES[: 2 * halves if wide else 2]

    def fitting(width: int, multiple: int = 32) -> tuple[int, ...]:
        of_tiles = (among * n for n in known)
        return tuple(n for n in of_tiles if width % n == 0 and _share(n, device, tiles) % multiple == 0)

    # What a group computes of q, k and v is all to be rotated, or nothing of it.
    of_heads = fitting(3 * shape.hidden, math.lcm(32, shape.head_dim))
    qkv = tuple(n for n in of_heads if 2 * shape.hidden % _share(n, device, tiles) == 0)
    # Of two groups one may have the only head, so that few tokens give more tiles.
    together = dict.fromkeys((halves, 1)) if wide else (halves,)
    heads = tuple(among * n for n in together if shape.heads % (among * n) == 0)
    out = fitting(shape.hidden)
    return _Widths(qkv, heads, out, fitting(shape.mlp), out)


def _share(columns: int, device: Device, tiles: _Rows) -> int:
    """Of a tile's columns those that a group of warps has."""
    own = columns // sides(tiles)
    alone = tiles.halves == 1 or (device.has_wide_tiles and own <= ALONE_COLUMNS)
    return own if alone else own // tiles.halves


def _behind_wait(cost: PhaseCost, device: Device, stages: int) -> PhaseCost:
    """A phase whose first weights cross the wait before it, as far as such a ring lets them."""
    ahead = device.ahead_share * device.wait_seconds
    return cost.after(ahead, max(0, stages - device.spare_stages))


def _stages(device: Device, stage: int, kept: int = 0) -> int:
    """Of so many bytes, those that a block has room for."""
    return min(MAX_STAGES, (device.shared_bytes - FIXED_BYTES - kept) // stage)


def _parts(shape: BlockShape, device: Device, fitting: Mapping[_Rows, _Widths]) -> int:
    """Into how many parts MLP_OUT is cut.

    A sum has other bits for each number of them. It is a function of the sequence alone, so that what a row
    gives does not depend on its batch: what they save one sequence shall be more than they cost sixteen,
    whose tiles go through one part after the other.
    """

    def seconds(parts: int) -> float:
        sizes = (shape._replace(batch=batch) for batch in (1, 16))
        return math.prod(_fastest_of_all(size, device, fitting, parts).loop_seconds for size in sizes)

    possible = PARTS if device.has_wide_tiles or shape.hidden <= MOST_SUMMED else PARTS[:1]
    return min((parts for parts in possible if shape.mlp % (parts * STEP) == 0), key=seconds)


def _fastest_of_all(shape: BlockShape, device: Device, fitting: Mapping[_Rows, _Widths], parts: int) -> Plan:
    return _best([_fastest(shape, device, rows, widths, parts) for rows, widths in fitting.items()])


def _best(plans: list[Plan]) -> Plan:
    return min(plans, key=lambda plan: (plan.stages < ENOUGH_STAGES, plan.stages < 2, plan.loop_seconds))


def _fastest(shape: BlockShape, device: Device, rows: _Rows, widths: _Widths, parts: int) -> Plan:
    """The fastest columns of each product, with and without MLP_SUM."""
    tiles = Tiles(rows.rows, 1, 1, 1, 1, 1, parts, blocks=rows.blocks)
    if rows.norms:
        tiles = tiles._replace(part=_rows_together(shape, device, tiles, "part", NORM_PARTS, Forward.NORM1))
    found = []
    if parts == 1 or device.has_wide_tiles:
        twice = (n for n in widths.mlp_out if _share(n, device, rows) <= MOST_TWICE[rows.norms])
        mlp_out = widths.mlp_out if parts == 1 else tuple(twice)
        found.append(_fastest_columns(shape, device, tiles, widths._replace(mlp_out=mlp_out)))
    if shape.hidden <= MOST_SUMMED:
        fitting = tuple(n for n in SUM_ROWS if n % rows.blocks == 0)
        sum_rows = _rows_together(shape, device, tiles, "sum_rows", fitting, Forward.MLP_SUM)
        summed = tiles._replace(sum_rows=sum_rows)
        found.append(_fastest_columns(shape, device, summed, widths))
    return _best(found)


def _rows_together(
    shape: BlockShape, device: Device, tiles: Tiles, field: str, numbers: tuple[int, ...], name: Forward
) -> int:
    """Of a phase that goes by rows. Of those that take about the same time the fewest instructions."""
    found = _choices(shape, device, tiles, field, numbers, name)
    taken: dict[int, float] = {getattr(choice.tiles, field): choice.seconds(device, 0) for choice in found}
    return max(number for number in taken if taken[number] <= 1.05 * min(taken.values()))


def _fastest_columns(shape: BlockShape, device: Device, tiles: Tiles, widths: _Widths) -> Plan:
    """They depend on each other only by the number of stages, about which the largest of them decides."""
    phases = dict(zip(widths._fields, _OF_WIDTHS, strict=True))
    products = {
        field: _choices(shape, device, tiles, field, columns, phases[field])
        for field, columns in widths._asdict().items()
    }

    def columns(stages: int) -> dict[str, _Choice]:
        return {
            field: min(
                (choice for choice in found if choice.stages >= stages),
                key=lambda choice: choice.seconds(device, stages),
            )
            for field, found in products.items()
        }

    def key(found: tuple[int, dict[str, _Choice]]) -> tuple[bool, bool, float]:
        stages, chosen = found
        seconds = sum(choice.seconds(device, stages) for choice in chosen.values())
        return stages < ENOUGH_STAGES, stages < 2, seconds

    most = min(max(choice.stages for choice in found) for found in products.values())
    different = {choice.stages for found in products.values() for choice in found if choice.stages <= most}
    tried = ((stages, columns(stages)) for stages in sorted(different, reverse=True))
    _, chosen = min(tried, key=key)
    fields: dict[str, Any] = {field: getattr(choice.tiles, field) for field, choice in chosen.items()}
    return plan_with(shape, device, tiles._replace(**fields))


@lru_cache(maxsize=256)  # MLP_OUT's parts change nothing about the other products
def _choices(
    shape: BlockShape, device: Device, tiles: Tiles, field: str, numbers: tuple[int, ...], name: Forward
) -> list[_Choice]:
    found = []
    for number in numbers:
        chosen: dict[str, Any] = {field: number}
        with_it = tiles._replace(**chosen)
        phases = [phase for phase in phases_of(with_it) if phase.name == name]
        stages = _stages(device, stage_bytes(shape, with_it))
        found.append(_Choice(with_it, stages, list(costs(phases, shape, with_it, device).values())))
    return found


def plan_with(shape: BlockShape, device: Device, tiles: Tiles) -> Plan:
    """What these tiles take by the model."""
    stage = stage_bytes(shape, tiles)
    stages = _stages(device, stage)
    taken = {
        name: _behind_wait(cost, device, stages)
        for name, cost in costs(phases_of(tiles), shape, tiles, device).items()
    }
    tokens, hidden = shape.batch * shape.length, shape.hidden
    products = 2 * tokens * hidden * (4 * hidden + 2 * shape.mlp) / device.product_flops
    attention = 4 * tokens * shape.length * hidden / device.attention_flops
    moved = sum(cost.bytes for cost in taken.values()) / device.l2_bytes
    return Plan(
        tiles,
        stages,
        stage,
        key_block(shape, tiles),
        taken,
        shape.layers * sum(cost.seconds + device.wait_seconds for cost in taken.values()),
        shape.layers * max(products + attention, moved, len(taken) * device.wait_seconds),
    )


def stage_bytes(shape: BlockShape, tiles: Tiles) -> int:
    """A stage of the ring holds a step of both operands of a product, or a block of keys or of values."""
    rows, among = block_rows(tiles), sides(tiles)
    rounded, of_stream, weights = 2 * STEP * rows, 4 * STEP * rows, 2 * STEP
    return max(
        (rounded if tiles.normalised else of_stream) + weights * (tiles.qkv // among),
        (rounded if tiles.part else of_stream) + weights * (tiles.mlp_in // among),
        rounded + weights * (max(tiles.attn_out, tiles.mlp_out) // among),
        2 * (tiles.heads // among) * shape.head_dim * max(key_block(shape, tiles), rows),
    )


def choose_backward(shape: BlockShape, device: Device = Device()) -> BackwardPlan:  # noqa: B008 - immutable
    """The fastest plan by the model.

    Raises:
        ValueError: the tiles divide a width in no way.
    """
    fitting = [
        BackwardTiles(rows, columns, PART * rows // max(ROW_TILES))
        for rows in (max(ROW_TILES), max(PAIR_ROWS))[: None if device.cluster > 1 else 1]
        for columns in BACKWARD_TILES[: None if rows == max(PAIR_ROWS) else -1]
        if not (shape.hidden % columns or shape.mlp % columns or columns % shape.head_dim)
    ]
    if not fitting:
        raise ValueError(
            f"no tiles of {BACKWARD_TILES} columns divide the widths of {shape} into whole heads"
        )
    plans = (_backward_plan(shape, device, tiles) for tiles in fitting)
    return min(plans, key=lambda plan: (plan.stages < ENOUGH_STAGES, plan.loop_seconds))


def _backward_plan(shape: BlockShape, device: Device, tiles: BackwardTiles) -> BackwardPlan:
    rows = block_rows(tiles)
    stage = max(2 * STEP * (rows + tiles.columns), 2 * KEY_BLOCK * shape.head_dim)
    kept = 2 * 2 * rows * shape.head_dim
    stages = _stages(device, stage, kept)
    taken = {
        name: _behind_wait(cost, device, stages)
        for name, cost in costs(backward.PHASES, shape, tiles, device).items()
    }
    of_weights = [taken[phase.name] for phase in backward.PHASES if phase.rows is not None]
    others = [taken[phase.name] for phase in backward.PHASES if phase.rows is None]
    # Gradients of weights follow each other, in equal tiles, and wait for nobody who does not wait for more.
    waves = math.ceil(sum(cost.tiles for cost in of_weights) / device.clusters(tiles.blocks))
    longest = max(cost.seconds / cost.waves for cost in of_weights)
    seconds = sum(cost.seconds + device.wait_seconds for cost in others) + waves * longest
    return BackwardPlan(
        tiles,
        stages,
        stage,
        kept,
        taken,
        shape.layers * seconds,
    )
