"""The phases of the backward pass, and the table of a shape.

Step j of the backward pass belongs to loop S - 1 - j. It runs that loop again from its input, which the
forward pass has kept, leaves a record of every layer, and goes back through the layers: the gradient of the
stream is updated in place, those of weights are added to fp32 sums that live for all steps. A tile of a
weight gradient sums over the tokens of all sequences and waits for all of them. Because all blocks meet once
in a step, a record needs one place for each layer, whatever S is.

Work that goes through whole rows (norms, sums over rows) is divided into parts of a row tile, so that there
are as many tiles of it as of the products.

Buffers have one place for each layer but for those in `SHARED`. The record: `state`, the stream before the
layer (of the first one: the loop's input, which is never written) and `middle` in it; `rows1`, `qkv`,
`mixed`, `log_sum_exp`, `branch1`, `rows2`, `mlp_in`, what GELU is applied to, `gelu`, `branch2`. Gradients:
`grad`, the stream's, which is there from the start; `grad_rows`, of modulated rows, and those of what the
record has; `inner`, products of attention's output and its gradient. Sums over rows: `sums1` and `sums2` for
norms, `gate1` and `gate2`, `bias`, and one for the weights of each product. Who writes a sum reads it too,
after the ones before; so does who writes `grad`. Weights and modulation are never written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from loopmdm_kernels.schedule.cost import STEP, shared_bytes
from loopmdm_kernels.schedule.table import (
    BlockShape,
    Cost,
    Counters,
    Phase,
    Region,
    RegionRows,
    Sizes,
    Table,
    Work,
    check_sizes,
)

PART = 16  # rows of a block that go through norms together: two a warp
KEY_BLOCK = 128  # keys of a stage
SHARED = ("grad", "grad_rows")


class Backward(IntEnum):
    # The loop again, with a record.
    NORM1 = 0
    QKV = 1
    ATTENTION = 2
    ATTN_OUT = 3
    NORM2 = 4
    MLP_IN = 5
    MLP_OUT = 6
    # Gradients, from the last layer down.
    TOP = 7
    GRAD_MLP_IN = 8
    GRAD_NORM2 = 9
    MIDDLE = 10
    GRAD_MIXED = 11
    GRAD_QUERIES = 12
    GRAD_KEYS = 13
    GRAD_NORM1 = 14
    BOTTOM = 15
    WEIGHT_MLP_OUT = 16
    WEIGHT_MLP_IN = 17
    WEIGHT_ATTN_OUT = 18
    WEIGHT_QKV = 19


class BackwardTiles(NamedTuple):
    """A tile of more than 128 rows is done by two blocks, half of the rows each."""

    rows: int  # tokens of a tile; of a weight gradient its rows
    columns: int  # of every product
    part: int  # rows of a tile that go through norms together

    @property
    def blocks(self) -> int:
        return 2 if self.rows > 128 else 1


Size = Callable[[BlockShape], int]


def _hidden(shape: BlockShape) -> int:
    return shape.hidden


def _mlp(shape: BlockShape) -> int:
    return shape.mlp


def _qkv(shape: BlockShape) -> int:
    return 3 * shape.hidden


def _rows(row_bytes: int) -> tuple[Sizes, Cost]:
    """Work on whole rows: so many bytes are moved for each of their numbers."""
    return lambda s, t: (t.rows, t.part), lambda s, t: Work(0, row_bytes * t.part * s.hidden)


def _product(width: Size, inner: Size, *, of_weights: bool = True) -> tuple[Sizes, Cost]:
    def cost(shape: BlockShape, tiles: BackwardTiles) -> Work:
        rows, columns, depth = tiles.rows, tiles.columns, inner(shape)
        right = 2 * columns * depth
        return Work(
            2 * rows * columns * depth, 2 * rows * depth + right, shared=shared_bytes(tiles, right),
            weights=right if of_weights else 0, steps=depth // STEP,
        )  # fmt: skip

    return lambda s, t: (width(s), t.columns), cost


def _heads(products: int, own: int) -> tuple[Sizes, Cost]:
    """Attention of a head: products of a tile, and how many operands of its own rows it reads."""

    def cost(shape: BlockShape, tiles: BackwardTiles) -> Work:
        keys = KEY_BLOCK * math.ceil(shape.length / KEY_BLOCK)
        flops = 2 * products * tiles.rows * keys * shape.head_dim
        others = 4 * shape.head_dim * shape.length
        moved = 2 * shape.head_dim * own * tiles.rows + others
        return Work(flops, moved, attention=True, shared=shared_bytes(tiles, others))

    return lambda s, t: (s.hidden, s.head_dim), cost


def _tokens(shape: BlockShape) -> int:
    return shape.batch * STEP * math.ceil(shape.length / STEP)


def _weight(name: Backward, before: Backward, left: str, right: str, height: Size, width: Size) -> Phase:
    """The gradient of a matrix [height, width]: that of its product's result, times the left operand."""
    return Phase(
        name, "sums over all loops, fp32", Counters((before,), "all"),
        *_product(width, _tokens, of_weights=False), rows=height, signals=Counters(),
        reads=(Region(left, "rows", "all"), Region(right, "tile", "all")),
        writes=(Region(name.name.lower(), "tile", "weight"),),
    )  # fmt: skip


def _part(*buffers: str, layer: int = 0) -> tuple[Region, ...]:
    return tuple(Region(buffer, rows="part", layer=layer) for buffer in buffers)


def _query_regions(rows: RegionRows) -> tuple[Region, ...]:
    """What gradients of scores need of queries."""
    numbers = (Region(buffer, "number", rows) for buffer in ("log_sum_exp", "inner"))
    return Region("qkv", "tile", rows), Region("grad_mixed", "tile", rows), *numbers


def _key_regions(rows: RegionRows) -> tuple[Region, ...]:
    return Region("qkv", "tile", rows, offset=1), Region("qkv", "tile", rows, offset=2)


B = Backward
PHASES = (
    Phase(
        B.NORM1, "norm and modulation, rounded", Counters((B.MLP_OUT,), layer=-1), *_rows(6),
        reads=_part("state"), writes=_part("rows1"),
    ),
    Phase(
        B.QKV, "product, rotary", Counters((B.NORM1,)), *_product(_qkv, _hidden),
        reads=(Region("rows1"),), writes=(Region("qkv", "tile"),),
    ),
    Phase(
        B.ATTENTION, "queries of one tile by all keys, one head", Counters((B.QKV,), "every"), *_heads(2, 1),
        reads=(Region("qkv", "tile"), *_key_regions("every")),
        writes=(Region("mixed", "tile"), Region("log_sum_exp", "number")),
    ),
    Phase(
        B.ATTN_OUT, "product, gate, residual", Counters((B.ATTENTION,)), *_product(_hidden, _hidden),
        reads=(Region("mixed"), Region("state", "tile")),
        writes=(Region("branch1", "tile"), Region("middle", "tile")),
    ),
    Phase(
        B.NORM2, "norm and modulation, rounded", Counters((B.ATTN_OUT,)), *_rows(6),
        reads=_part("middle"), writes=_part("rows2"),
    ),
    Phase(
        B.MLP_IN, "product, bias, GELU", Counters((B.NORM2,)), *_product(_mlp, _hidden),
        reads=(Region("rows2"),), writes=(Region("mlp_in", "tile"), Region("gelu", "tile")),
    ),
    Phase(
        B.MLP_OUT, "product, bias, gate, residual", Counters((B.MLP_IN,)), *_product(_hidden, _mlp),
        reads=(Region("gelu"), Region("middle", "tile")),
        writes=(Region("branch2", "tile"), Region("state", "tile", layer=1)),
    ),
    Phase(
        B.TOP, "gradient of the last layer's MLP branch", Counters((B.MLP_OUT,)), *_rows(8),
        reads=_part("branch2"), writes=_part("grad", "grad_branch2", "gate2"),
    ),
    Phase(
        B.GRAD_MLP_IN, "product, GELU's slope", Counters((B.TOP,)), *_product(_mlp, _hidden),
        reads=(Region("grad_branch2"), Region("mlp_in", "tile")),
        writes=(Region("grad_mlp_in", "tile"), Region("bias", "tile")),
    ),
    Phase(
        B.GRAD_NORM2, "product: gradient of the modulated rows", Counters((B.GRAD_MLP_IN,)),
        *_product(_hidden, _mlp),
        reads=(Region("grad_mlp_in"),), writes=(Region("grad_rows", "tile"),),
    ),
    Phase(
        B.MIDDLE, "stream's gradient through the second norm; that of the attention branch",
        Counters((B.GRAD_NORM2,)), *_rows(28),
        reads=_part("middle", "grad_rows", "branch1"),
        writes=_part("sums2", "grad", "grad_branch1", "gate1"),
    ),
    Phase(
        B.GRAD_MIXED, "product; its product with attention's output, by head", Counters((B.MIDDLE,)),
        *_product(_hidden, _hidden),
        reads=(Region("grad_branch1"), Region("mixed", "tile")),
        writes=(Region("grad_mixed", "tile"), Region("inner", "heads")),
    ),
    Phase(
        B.GRAD_QUERIES, "gradient of q, turned back", Counters((B.GRAD_MIXED,)), *_heads(3, 2),
        reads=(*_query_regions("own"), *_key_regions("every")), writes=(Region("grad_qkv", "tile"),),
    ),
    Phase(
        B.GRAD_KEYS, "gradients of k, turned back, and v", Counters((B.GRAD_MIXED,), "every"), *_heads(4, 2),
        signals=Counters((B.GRAD_QUERIES,)),
        reads=(*_query_regions("every"), *_key_regions("own")),
        writes=(Region("grad_qkv", "tile", offset=1), Region("grad_qkv", "tile", offset=2)),
    ),
    Phase(
        B.GRAD_NORM1, "product: gradient of the modulated rows", Counters((B.GRAD_QUERIES,)),
        *_product(_hidden, _qkv),
        reads=(Region("grad_qkv"),), writes=(Region("grad_rows", "tile"),),
    ),
    Phase(
        B.BOTTOM, "as MIDDLE, through the first norm, to the MLP branch of the layer below",
        Counters((B.GRAD_NORM1,)), *_rows(28), signals=Counters((B.TOP,), layer=-1),
        reads=(*_part("state", "grad_rows"), *_part("branch2", layer=-1)),
        writes=(*_part("sums1", "grad"), *_part("grad_branch2", "gate2", layer=-1)),
    ),
    _weight(B.WEIGHT_MLP_OUT, B.TOP, "grad_branch2", "gelu", _hidden, _mlp),
    _weight(B.WEIGHT_MLP_IN, B.GRAD_MLP_IN, "grad_mlp_in", "rows2", _mlp, _hidden),
    _weight(B.WEIGHT_ATTN_OUT, B.MIDDLE, "grad_branch1", "mixed", _hidden, _hidden),
    _weight(B.WEIGHT_QKV, B.GRAD_QUERIES, "grad_qkv", "rows1", _qkv, _hidden),
)  # fmt: skip
# Tiles of weights' gradients are few and long, and each belongs to one block: all of a layer in a row leave
# fewer blocks without work than those of one weight would. Nobody waits for them but the next step.
_DOWN = (
    B.GRAD_MLP_IN, B.GRAD_NORM2, B.MIDDLE, B.GRAD_MIXED, B.GRAD_QUERIES, B.GRAD_KEYS,
    B.WEIGHT_MLP_OUT, B.WEIGHT_MLP_IN, B.WEIGHT_ATTN_OUT, B.WEIGHT_QKV, B.GRAD_NORM1, B.BOTTOM,
)  # fmt: skip


def build_backward(shape: BlockShape, tiles: BackwardTiles) -> Table:
    """The table of a shape. Neither the number of thread blocks nor that of loops is part of it.

    Raises:
        ValueError: a width is no multiple of its tile.
    """
    _check(shape, tiles)
    layers = range(shape.layers)
    order = [(PHASES[name], layer) for layer in layers for name in range(B.TOP)]
    order.append((PHASES[B.TOP], shape.layers - 1))
    order += [(PHASES[name], layer) for layer in reversed(layers) for name in _DOWN]
    return Table(shape, tiles, PHASES, meets=True).made(order)


def _check(shape: BlockShape, tiles: BackwardTiles) -> None:
    check_sizes(**shape._asdict(), **tiles._asdict())
    for name, width in (("hidden", shape.hidden), ("mlp", shape.mlp)):
        if width % tiles.columns:
            raise ValueError(f"tiles.columns: got {tiles.columns}, expected a divisor of {name} {width}")
    if tiles.columns % shape.head_dim:
        raise ValueError(
            f"tiles.columns: got {tiles.columns}, expected a multiple of the head size {shape.head_dim}"
        )
    if tiles.rows % tiles.part:
        raise ValueError(f"tiles.part: got {tiles.part}, expected a divisor of tiles.rows {tiles.rows}")
