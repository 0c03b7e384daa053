"""The phases of the forward pass, and the table of a shape.

Buffers: `stream` x, two halves; `qkv`, two halves; `mixed`, the attention output; `gelu`, the activations
inside the MLP; `rows`, normalised and modulated rows; `partial`, what the parts of MLP_OUT leave for
MLP_SUM; `statistics1` and `statistics2`, mean and squared deviations of tile columns for the norms of
attention and MLP; `change`, the squared norms that EXIT adds up; `stop`, the sequence's number of loops;
`out`. Weights and modulation are never written.

MLP_SUM has whole rows, and so normalises them for the next layer's QKV at once. For the first layer of the
first loop ENTER does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from loopmdm_kernels.schedule.cost import attention_work, product_work
from loopmdm_kernels.schedule.table import BlockShape, Counters, Phase, Region, Table, Work, check_sizes

STATISTICS_COLUMNS = 32  # of a row, whatever the tiles
QUADS = 64  # of threads in a block: each has so many columns of a row that MLP_SUM adds
SUMS_TOGETHER = 16  # parts, and the stream, of these columns, that a quad loads together
MOST_SUMMED = QUADS * STATISTICS_COLUMNS  # columns of such a row


class Forward(IntEnum):
    ENTER = 0
    NORM1 = 1
    QKV = 2
    ATTENTION = 3
    ATTN_OUT = 4
    NORM2 = 5
    MLP_IN = 6
    MLP_OUT = 7
    MLP_SUM = 8
    EXIT = 9
    LEAVE = 10


class Tiles(NamedTuple):
    """Tile sizes: rows (tokens) of every phase, columns of each product, heads of an attention tile.

    The inner dimension of MLP_OUT may be cut into parts, which are added in their order: by MLP_SUM,
    `sum_rows` rows at a time, so that few tokens give more tiles, or where that is 0 one after the other by
    one tile, to the same bits. Rows are normalised by NORM1 and NORM2, `part` of them at a time, or where
    that is 0 on their way into each product; what MLP_SUM has made is normalised by it. Two blocks may share
    a tile, half of its rows each; or four, half of its rows and half of its columns, or heads, each.
    """

    rows: int
    qkv: int
    attn_out: int
    mlp_in: int
    mlp_out: int
    heads: int = 1
    mlp_out_parts: int = 1
    part: int = 0
    blocks: int = 1
    sum_rows: int = 0

    @property
    def mlp_out_tiles(self) -> int:
        """That share the inner dimension of MLP_OUT."""
        return self.mlp_out_parts if self.sum_rows else 1

    @property
    def normalised(self) -> bool:
        """Whether QKV gets its rows normalised. MLP_IN does where `part` says so."""
        return self.part > 0 or self.sum_rows > 0


_LAST = (Forward.MLP_SUM, Forward.MLP_OUT)  # of a layer
_MLP_OUT = Phase(
    Forward.MLP_OUT,
    "product, bias, gate, residual",
    waits_for=Counters((Forward.MLP_IN,)),
    columns=lambda s, t: (s.hidden, t.mlp_out),
    slots=lambda layer: (1, 1),
    reads=(Region("gelu", "inner"), Region("stream", "tile"), Region("stream", "tile", exits=True)),
    writes=(
        Region("stream", "tile"),
        Region("statistics1", "number"),
        Region("change", "number", exits=True),
    ),
    cost=lambda s, t: product_work(s, t, t.mlp_out, s.mlp),
)
# Where the inner dimension is cut: the parts, and what adds them up, does what else MLP_OUT does, and the
# norm.
_MLP_PART = _MLP_OUT._replace(
    parts=lambda t: t.mlp_out_tiles,
    reads=(Region("gelu", "inner"),),
    writes=(Region("partial", "tile"),),
    cost=lambda s, t: product_work(
        s, t, t.mlp_out, s.mlp // t.mlp_out_tiles, written=4 * min(t.rows, s.length) * t.mlp_out
    ),
)
_MLP_SUM = Phase(
    Forward.MLP_SUM, "sum of the parts, bias, gate, residual, norm and modulation",
    Counters((Forward.MLP_OUT,)),
    columns=lambda s, t: (t.rows, t.sum_rows), slots=lambda layer: (1, 1),
    reads=(
        Region("partial", rows="part"), Region("stream", rows="part"),
        Region("stream", rows="part", exits=True),
    ),
    writes=(
        Region("stream", rows="part"), Region("rows", rows="part"), Region("change", "number", exits=True),
    ),
    cost=lambda s, t: Work(0, t.sum_rows * s.hidden * (4 * t.mlp_out_tiles + 10), trips=sum_trips(s, t)),
)  # fmt: skip


def _norm(name: Forward, after: Counters, statistics: str, slots: Callable[[int], tuple[int, int]]) -> Phase:
    return Phase(
        name, "norm and modulation, rounded", after,
        columns=lambda s, t: (t.rows, t.part), slots=slots,
        reads=(Region("stream", rows="part"), Region(statistics, rows="part")),
        writes=(Region("rows", rows="part"),),
        cost=lambda s, t: Work(
            0, t.part * (6 * s.hidden + 8 * s.hidden // STATISTICS_COLUMNS), trips=_norm_trips(s, t)
        ),
    )  # fmt: skip


def _of_norm(
    name: Forward, does: str, norm: Forward, width: Callable[[BlockShape], int], tile: str, writes: str
) -> Phase:
    """A product of normalised rows."""
    return Phase(
        name, does, Counters((norm,)),
        columns=lambda s, t: (width(s), getattr(t, tile)), slots=lambda layer: (0, layer & 1),
        reads=(Region("rows"),), writes=(Region(writes, "tile"),),
        cost=lambda s, t: product_work(s, t, getattr(t, tile), s.hidden),
    )  # fmt: skip


def _of_stream(phase: Phase, norm: Phase) -> Phase:
    """The same where rows are normalised on their way into the product."""
    return phase._replace(
        does=f"norm, modulation, {phase.does}",
        waits_for=norm.waits_for,
        slots=lambda layer: (norm.slots(layer)[0], phase.slots(layer)[1]),
        reads=tuple(region._replace(rows="own") for region in norm.reads),
        cost=lambda s, t: product_work(s, t, phase.columns(s, t)[1], s.hidden, left_bytes=4),
    )


_BEFORE = Counters(_LAST, layer=-1)
_NORM1 = _norm(Forward.NORM1, _BEFORE, "statistics1", lambda layer: (int(layer > 0), 0))
_NORM2 = _norm(Forward.NORM2, Counters((Forward.ATTN_OUT,)), "statistics2", lambda layer: (1, 0))
_QKV = _of_norm(Forward.QKV, "product, rotary", Forward.NORM1, lambda s: 3 * s.hidden, "qkv", "qkv")
_MLP_IN = _of_norm(Forward.MLP_IN, "product, bias, GELU", Forward.NORM2, lambda s: s.mlp, "mlp_in", "gelu")
PHASES = (
    Phase(
        Forward.ENTER, "rows of x", Counters(), signals=Counters(_LAST, layer=-1), slots=lambda layer: (0, 1),
        writes=(Region("stream"), Region("statistics1")),
    ),
    _NORM1,
    _QKV,
    Phase(
        Forward.ATTENTION, "queries of one tile by all keys, one head", Counters((Forward.QKV,), "every"),
        columns=lambda s, t: (s.hidden, t.heads * s.head_dim),
        slots=lambda layer: (layer & 1, 0),
        reads=(
            Region("qkv", "tile"),
            Region("qkv", "tile", "every", offset=1), Region("qkv", "tile", "every", offset=2),
        ),
        writes=(Region("mixed", "tile"),),
        cost=attention_work,
    ),
    Phase(
        Forward.ATTN_OUT, "product, gate, residual", Counters((Forward.ATTENTION,)),
        columns=lambda s, t: (s.hidden, t.attn_out),
        # The first layer's moves the stream to the other half; from there it is updated in place.
        slots=lambda layer: (int(layer > 0), 1),
        reads=(Region("mixed"), Region("stream", "tile")),
        writes=(Region("stream", "tile"), Region("statistics2", "number")),
        cost=lambda s, t: product_work(s, t, t.attn_out, s.hidden),
    ),
    _NORM2,
    _MLP_IN,
    _MLP_OUT,
    _MLP_SUM,
    Phase(
        Forward.EXIT, "adds the squared changes: does the sequence go on?", Counters(_LAST, "every"),
        once=True, signals=Counters(),
        reads=(Region("change", rows="every", exits=True),), writes=(Region("stop", rows="once"),),
    ),
    Phase(
        Forward.LEAVE, "rows of the stream", Counters(_LAST), signals=Counters(),
        reads=(Region("stream"),), writes=(Region("out"),),
    ),
)  # fmt: skip


def sum_trips(shape: BlockShape, tiles: Tiles) -> int:
    """Times that a tile of MLP_SUM loads: a quad's parts of as many rows together as registers hold."""
    rows = QUADS * STATISTICS_COLUMNS // shape.hidden * max(1, SUMS_TOGETHER // (tiles.mlp_out_tiles + 1))
    return math.ceil(tiles.sum_rows / tiles.blocks / rows) if rows else 0


def _norm_trips(shape: BlockShape, tiles: Tiles) -> int:
    """Eight warps have two rows each, of 1024 columns at most."""
    return math.ceil(tiles.part / tiles.blocks / (16 if shape.hidden <= 1024 else 8))


def phases_of(tiles: Tiles) -> tuple[Phase, ...]:
    """Those that the table of such tiles has."""
    return _phases(tiles.part > 0, tiles.sum_rows > 0)


@cache
def _phases(norms: bool, sums: bool) -> tuple[Phase, ...]:
    instead: dict[Forward, Phase | None] = {}
    if not norms:
        instead |= {Forward.NORM1: None, Forward.QKV: _of_stream(_QKV, _NORM1)}
        instead |= {Forward.NORM2: None, Forward.MLP_IN: _of_stream(_MLP_IN, _NORM2)}
    if sums:
        enter = PHASES[0]
        instead |= {Forward.ENTER: enter._replace(writes=(*enter.writes, Region("rows")))}
        instead |= {Forward.NORM1: None, Forward.QKV: _QKV._replace(waits_for=_BEFORE)}
    instead |= {Forward.MLP_OUT: _MLP_PART} if sums else {Forward.MLP_SUM: None}
    phases = (instead.get(Forward(phase.name), phase) for phase in PHASES)
    return tuple(phase for phase in phases if phase is not None)


def build(shape: BlockShape, tiles: Tiles, *, adaptive: bool = False) -> Table:
    """The table of a shape. Neither the number of thread blocks nor that of loops is part of it.

    Args:
        adaptive: sequences may stop after any loop; adds an EXIT instruction for each.

    Raises:
        ValueError: a width is no multiple of its tile.
    """
    _check(shape, tiles)
    enter, *layers, exits, leave = phases_of(tiles)
    last = shape.layers - 1
    order = [(exits, last)] * adaptive
    order += [(phase, layer) for layer in range(shape.layers) for phase in layers]
    return Table(shape, tiles, phases_of(tiles), adaptive).made(order, [(enter, 0)], [(leave, last)])


def _check(shape: BlockShape, tiles: Tiles) -> None:
    widths = {
        "qkv": 3 * shape.hidden,
        "attn_out": shape.hidden,
        "mlp_in": shape.mlp,
        "mlp_out": shape.hidden,
    }
    for name, width in widths.items():
        tile = getattr(tiles, name)
        if tile < 1 or width % tile:
            raise ValueError(f"tiles.{name}: got {tile}, expected a divisor of {width}")
    if tiles.mlp_out_parts < 1 or shape.mlp % tiles.mlp_out_parts:
        raise ValueError(f"tiles.mlp_out_parts: got {tiles.mlp_out_parts}, expected a divisor of {shape.mlp}")
    if tiles.qkv % shape.head_dim:
        raise ValueError(f"tiles.qkv: got {tiles.qkv}, expected a multiple of the head size {shape.head_dim}")
    for name in ("part", "sum_rows"):
        number = getattr(tiles, name)
        if number < 0 or (number and tiles.rows % number):
            raise ValueError(
                f"tiles.{name}: got {number}, expected 0 or a divisor of tiles.rows {tiles.rows}"
            )
    if tiles.blocks not in (1, 2, 4) or tiles.rows % tiles.blocks:
        raise ValueError(
            f"tiles.blocks: got {tiles.blocks}, expected 1, 2 or 4 and a divisor of tiles.rows {tiles.rows}"
        )
    check_sizes(**shape._asdict(), **{"tiles.rows": tiles.rows, "tiles.heads": tiles.heads})
