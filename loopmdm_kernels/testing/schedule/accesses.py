"""What each instruction reads and writes, as intervals of columns of buffer rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from loopmdm_kernels.schedule.backward import SHARED
from loopmdm_kernels.schedule.forward import Forward
from loopmdm_kernels.schedule.table import Instruction, Phase, Region, Table, qkv_slot, stream_slot


class Access(NamedTuple):
    buffer: str
    half: int  # of a double buffer, or the layer; 0 for what there is once
    sequence: int
    row: int  # row tile, or part of it; 0 for what a sequence has once
    first: int  # columns [first, last)
    last: int
    writes: bool


def accesses(table: Table) -> Callable[[int, Instruction], Iterable[Access]]:
    """Those of an instruction of a loop."""
    phases = {int(phase.name): phase for phase in table.phases}
    places = _of_record if table.meets else _of_halves

    def found(loop: int, item: Instruction) -> Iterator[Access]:
        phase = phases[item.phase]
        if table.adaptive and phase.name not in (Forward.ENTER, Forward.EXIT):
            yield Access("stop", 0, item.sequence, 0, 0, 1, False)
        for writes, regions in ((False, phase.reads), (True, phase.writes)):
            for region in regions:
                place = places(table, phase, region, loop, item, writes)
                if place is None:
                    continue
                for first, last in _columns(table, phase, region, item):
                    for sequence, row in _rows(table, phase, region, item):
                        yield Access(region.buffer, place, sequence, row, first, last, writes)

    return found


def _of_halves(
    table: Table, phase: Phase, region: Region, loop: int, item: Instruction, writes: bool
) -> int | None:
    """The half of the forward pass's double buffers; None: not touched here."""
    if region.exits and not (table.adaptive and item.layer == table.shape.layers - 1):
        return None
    if phase.name is Forward.EXIT and not writes and loop == 0:
        return None
    slot = item.write_slot if writes else 0 if region.exits else item.read_slot
    if region.buffer == "stream":
        return stream_slot(slot, loop)
    return qkv_slot(slot, loop, table.shape.layers) if region.buffer == "qkv" else 0


def _of_record(
    table: Table, phase: Phase, region: Region, loop: int, item: Instruction, writes: bool
) -> int | None:
    """The layer of the backward pass's buffers; None: there is none."""
    layer = item.layer + region.layer
    if not 0 <= layer < table.shape.layers or (region.buffer == "state" and layer == 0):
        return None
    return 0 if region.buffer in SHARED else layer


def _columns(table: Table, phase: Phase, region: Region, item: Instruction) -> Iterator[tuple[int, int]]:
    shape, tiles = table.shape, table.tiles
    width, tile = phase.columns(shape, tiles)
    first = item.column * tile
    last = min(first + tile, width)
    if region.columns == "whole":
        first, last = 0, _width(table, region.buffer)
    elif region.columns == "number":
        first, last = item.column, item.column + 1
    elif region.columns == "heads":
        first, last = first // shape.head_dim, last // shape.head_dim
    elif region.columns == "inner":
        inner = shape.mlp // tiles.mlp_out_tiles
        first, last = item.part * inner, (item.part + 1) * inner
    elif region.columns == "rows":
        assert phase.rows is not None
        first, last = item.row * tiles.rows, min((item.row + 1) * tiles.rows, phase.rows(shape))
    offsets = [region.offset]
    if region.buffer == "partial":  # of each part its own columns
        offsets = [item.part] if phase.name == Forward.MLP_OUT else list(range(tiles.mlp_out_tiles))
    for offset in offsets:
        yield offset * shape.hidden + first, offset * shape.hidden + last


def _width(table: Table, buffer: str) -> int:
    shape, tiles = table.shape, table.tiles
    if buffer == "change" and _sum_rows(table):
        return int(tiles.rows // tiles.sum_rows)
    if buffer in ("statistics1", "change"):
        return int(shape.hidden // tiles.mlp_out)
    if buffer == "statistics2":
        return int(shape.hidden // tiles.attn_out)
    if buffer in ("gelu", "grad_mlp_in"):
        return shape.mlp
    return {"grad_qkv": 3 * shape.hidden, "stop": 1}.get(buffer, shape.hidden)


def _sum_rows(table: Table) -> int:
    return getattr(table.tiles, "sum_rows", 0)  # the backward pass has no such tiles


def _rows(table: Table, phase: Phase, region: Region, item: Instruction) -> Iterator[tuple[int, int]]:
    """(sequence, row), in rows as few as any phase goes through together."""
    tiles = table.tiles
    unit = math.gcd(tiles.rows, tiles.part, _sum_rows(table))
    parts = tiles.rows // unit
    rows = range(item.row * parts, (item.row + 1) * parts)
    if region.rows in ("every", "all"):
        rows = range(table.row_tiles * parts)
    elif region.rows == "part":
        own = phase.columns(table.shape, tiles)[1] // unit
        first = item.row * parts + item.column * own
        rows = range(first, first + own)
    elif region.rows != "own":
        row = {"once": 0, "weight": item.row}[region.rows]
        rows = range(row, row + 1)
    for sequence in range(table.shape.batch) if region.rows == "all" else (item.sequence,):
        for row in rows:
            yield sequence, row
