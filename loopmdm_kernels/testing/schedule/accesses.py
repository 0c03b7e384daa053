"""What each instruction reads and writes, as intervals of columns of buffer rows.

Buffers: `stream` x, two halves; `qkv`, two halves; `mixed`, the attention output; `wide`, the activations
inside the MLP; `partial`, what the parts of MLP_OUT leave for MLP_SUM; `statistics1` and `statistics2`, mean
and squared deviations of tile columns for the norms of attention and MLP; `change`, the squared norms that
EXIT adds up; `stop`, the sequence's number of loops; `out`. Weights and modulation are never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loopmdm_kernels.schedule.table import Instruction, Phase, Table, qkv_slot, stream_slot


class Access(NamedTuple):
    buffer: str
    half: int  # of a double buffer; 0 for the others
    sequence: int
    row: int  # row tile; 0 for what a sequence has once
    first: int  # columns [first, last)
    last: int
    writes: bool


def accesses(table: Table, item: Instruction, loop: int) -> Iterator[Access]:
    shape, tiles = table.shape, table.tiles
    phase, last_layer = Phase(item.phase), shape.layers - 1

    def whole(buffer: str, half: int, columns: int, *, row: int = item.row, writes: bool = False) -> Access:
        return Access(buffer, half, item.sequence, row, 0, columns, writes)

    def tile(buffer: str, half: int, width: int, *, writes: bool, offset: int = 0) -> Access:
        first = offset + item.column * width
        return Access(buffer, half, item.sequence, item.row, first, first + width, writes)

    def update(width: int) -> Iterator[Access]:
        yield tile("stream", stream_slot(item.read_slot, loop), width, writes=False)
        yield tile("stream", stream_slot(item.write_slot, loop), width, writes=True)

    if phase not in (Phase.ENTER, Phase.EXIT) and table.adaptive:
        yield whole("stop", 0, 1, row=0)
    if phase is Phase.ENTER:
        yield whole("stream", stream_slot(item.write_slot, loop), shape.hidden, writes=True)
        yield whole("statistics1", 0, shape.hidden // tiles.mlp_out, writes=True)
    elif phase is Phase.QKV:
        yield whole("stream", stream_slot(item.read_slot, loop), shape.hidden)
        yield whole("statistics1", 0, shape.hidden // tiles.mlp_out)
        yield tile("qkv", qkv_slot(item.write_slot, loop, shape.layers), tiles.qkv, writes=True)
    elif phase is Phase.ATTENTION:
        half = qkv_slot(item.read_slot, loop, shape.layers)
        first = item.column * tiles.heads * shape.head_dim
        last = min(first + tiles.heads * shape.head_dim, shape.hidden)
        yield Access("qkv", half, item.sequence, item.row, first, last, False)
        for row in range(table.row_tiles):
            for offset in (shape.hidden, 2 * shape.hidden):
                yield Access("qkv", half, item.sequence, row, offset + first, offset + last, False)
        yield Access("mixed", 0, item.sequence, item.row, first, last, True)
    elif phase is Phase.ATTN_OUT:
        yield whole("mixed", 0, shape.hidden)
        yield from update(tiles.attn_out)
        yield tile("statistics2", 0, 1, writes=True)
    elif phase is Phase.MLP_IN:
        yield whole("stream", stream_slot(item.read_slot, loop), shape.hidden)
        yield whole("statistics2", 0, shape.hidden // tiles.attn_out)
        yield tile("wide", 0, tiles.mlp_in, writes=True)
    elif phase is Phase.MLP_OUT and tiles.mlp_out_parts > 1:
        width = shape.mlp // tiles.mlp_out_parts
        yield Access("wide", 0, item.sequence, item.row, item.part * width, (item.part + 1) * width, False)
        yield tile("partial", 0, tiles.mlp_out, writes=True, offset=item.part * shape.hidden)
    elif phase in (Phase.MLP_OUT, Phase.MLP_SUM):
        if phase is Phase.MLP_OUT:
            yield whole("wide", 0, shape.mlp)
        else:
            for part in range(tiles.mlp_out_parts):
                yield tile("partial", 0, tiles.mlp_out, writes=False, offset=part * shape.hidden)
        yield from update(tiles.mlp_out)
        yield tile("statistics1", 0, 1, writes=True)
        if table.adaptive and item.layer == last_layer:
            yield tile("stream", stream_slot(0, loop), tiles.mlp_out, writes=False)
            yield tile("change", 0, 1, writes=True)
    elif phase is Phase.EXIT:
        if loop > 0:
            for row in range(table.row_tiles):
                yield whole("change", 0, shape.hidden // tiles.mlp_out, row=row)
        yield whole("stop", 0, 1, row=0, writes=True)
    else:
        yield whole("stream", stream_slot(item.read_slot, loop), shape.hidden)
        yield whole("out", 0, shape.hidden, writes=True)
