"""The phases of the forward pass, and the table of a shape.

Buffers: `stream` x, two halves; `qkv`, two halves; `mixed`, the attention output; `gelu`, the activations
inside the MLP; `partial`, what the parts of MLP_OUT leave for MLP_SUM; `statistics1` and `statistics2`, mean
and squared deviations of tile columns for the norms of attention and MLP; `change`, the squared norms that
EXIT adds up; `stop`, the sequence's number of loops; `out`. Weights and modulation are never written.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from loopmdm_kernels.schedule.cost import attention_work, product_work
from loopmdm_kernels.schedule.table import BlockShape, Counters, Phase, Region, Table, Work, check_sizes


class Forward(IntEnum):
    ENTER = 0
    QKV = 1
    ATTENTION = 2
    ATTN_OUT = 3
    MLP_IN = 4
    MLP_OUT = 5
    MLP_SUM = 6
    EXIT = 7
    LEAVE = 8


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
    cost=lambda s, t: product_work(s, t.rows, t.mlp_out, s.mlp),
)
# Where the inner dimension is cut: the parts, and what adds them up and does what else MLP_OUT does.
_MLP_PART = _MLP_OUT._replace(
    parts=lambda t: t.mlp_out_parts,
    reads=(Region("gelu", "inner"),),
    writes=(Region("partial", "tile"),),
    cost=lambda s, t: product_work(s, t.rows, t.mlp_out, s.mlp // t.mlp_out_parts, written=_part_bytes(s, t)),
)
_MLP_SUM = _MLP_OUT._replace(
    name=Forward.MLP_SUM,
    does="sum of the parts, bias, gate, residual",
    waits_for=Counters((Forward.MLP_OUT,)),
    reads=(Region("partial", "tile"), *_MLP_OUT.reads[1:]),
    cost=lambda s, t: Work(0, t.mlp_out_parts * _part_bytes(s, t)),
)
PHASES = (
    Phase(
        Forward.ENTER, "rows of x", Counters(), signals=Counters(_LAST, layer=-1), slots=lambda layer: (0, 1),
        writes=(Region("stream"), Region("statistics1")),
    ),
    Phase(
        Forward.QKV, "norm, modulation, product, rotary", Counters(_LAST, layer=-1),
        columns=lambda s, t: (3 * s.hidden, t.qkv),
        slots=lambda layer: (int(layer > 0), layer & 1),
        reads=(Region("stream"), Region("statistics1")),
        writes=(Region("qkv", "tile"),),
        cost=lambda s, t: product_work(s, t.rows, t.qkv, s.hidden, left_bytes=4),
    ),
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
        cost=lambda s, t: product_work(s, t.rows, t.attn_out, s.hidden),
    ),
    Phase(
        Forward.MLP_IN, "norm, modulation, product, bias, GELU", Counters((Forward.ATTN_OUT,)),
        columns=lambda s, t: (s.mlp, t.mlp_in),
        slots=lambda layer: (1, 0),
        reads=(Region("stream"), Region("statistics2")),
        writes=(Region("gelu", "tile"),),
        cost=lambda s, t: product_work(s, t.rows, t.mlp_in, s.hidden, left_bytes=4),
    ),
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


def _part_bytes(shape: BlockShape, tiles: Tiles) -> int:
    return 4 * min(tiles.rows, shape.length) * tiles.mlp_out


def phases_of(tiles: Tiles) -> tuple[Phase, ...]:
    if tiles.mlp_out_parts > 1:
        return tuple(_MLP_PART if phase is _MLP_OUT else phase for phase in PHASES)
    return tuple(phase for phase in PHASES if phase is not _MLP_SUM)


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
    check_sizes(**shape._asdict(), **{"tiles.rows": tiles.rows, "tiles.heads": tiles.heads})
