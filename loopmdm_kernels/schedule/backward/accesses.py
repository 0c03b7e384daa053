"""What each instruction of the backward pass reads and writes, as intervals of columns of buffer parts.

A place is a buffer, a layer, a sequence and a part of a row tile. Buffers of the record: `state`, the stream
before the layer (of the first one: the loop's input, which is never written) and `middle` in it; `rows1`,
`qkv`, `mixed`, `top` (log-sum-exp), `branch1`, `rows2`, `before`, `wide`, `branch2`. Of the gradients:
`grad`, the stream's, which is there from the start; `of_branch2`, `of_before`, `of_rows`, `of_branch1`,
`of_mixed`, `inner` (with the output of attention), `of_qkv`; the sums `norm1`, `norm2`, `gate1`, `gate2` and
`bias` over rows, and one for the weights of each product. A sum is read by those who write it, after the ones
before; so is `grad`. Weights and modulation are never written.
"""

from __future__ import annotations

from collections.abc import Iterator

from loopmdm_kernels.schedule.accesses import Access
from loopmdm_kernels.schedule.backward.table import ROW_PHASES, WEIGHT_PHASES, BackwardTable, P, weight_sizes
from loopmdm_kernels.schedule.table import Instruction

# The operands of a weight gradient: gradient of the product's result, and its left operand.
OPERANDS = {
    P.WEIGHT_MLP_OUT: ("of_branch2", "wide"),
    P.WEIGHT_MLP_IN: ("of_before", "rows2"),
    P.WEIGHT_ATTN_OUT: ("of_branch1", "mixed"),
    P.WEIGHT_QKV: ("of_qkv", "rows1"),
}


def backward_accesses(table: BackwardTable, item: Instruction) -> Iterator[Access]:
    phase, layer, shape, parts = P(item.phase), item.layer, table.shape, table.parts
    hidden, head_dim = shape.hidden, shape.head_dim
    every_part = range(table.row_tiles * parts)
    own_parts = range(item.row * parts, (item.row + 1) * parts)
    columns = item.column * table.tiles.columns, (item.column + 1) * table.tiles.columns

    def at(
        buffer: str, span: tuple[int, int], rows: range, *, writes: bool = False, of: int = layer
    ) -> Iterator[Access]:
        for part in rows:
            yield Access(buffer, of, item.sequence, part, *span, writes)

    def own(buffer: str, width: int) -> Iterator[Access]:
        return at(buffer, (0, width), own_parts)

    def tile(buffer: str, span: tuple[int, int] = columns, *, writes: bool = True) -> Iterator[Access]:
        return at(buffer, span, own_parts, writes=writes)

    if phase in WEIGHT_PHASES:
        left, right = OPERANDS[phase]
        rows = item.row * table.tiles.rows, (item.row + 1) * table.tiles.rows
        yield Access(f"weight of {phase.name}", layer, 0, item.row, *columns, True)
        for sequence in range(shape.batch):
            for part in every_part:
                yield Access(
                    left, layer, sequence, part, rows[0], min(rows[1], weight_sizes(shape)[phase][0]), False
                )
                yield Access(right, layer, sequence, part, *columns, False)
        return
    if phase in ROW_PHASES:
        yield from _rows(table, item)
    elif phase is P.QKV:
        yield from own("rows1", hidden)
        yield from tile("qkv")
    elif phase is P.ATTENTION:
        head = item.column * head_dim, (item.column + 1) * head_dim
        yield from tile("qkv", head, writes=False)
        for offset in (hidden, 2 * hidden):
            yield from at("qkv", (offset + head[0], offset + head[1]), every_part)
        yield from tile("mixed", head)
        yield from tile("top", (item.column, item.column + 1))
    elif phase is P.ATTN_OUT:
        yield from own("mixed", hidden)
        if layer:
            yield from tile("state", writes=False)
        yield from tile("branch1")
        yield from tile("middle")
    elif phase is P.MLP_IN:
        yield from own("rows2", hidden)
        yield from tile("before")
        yield from tile("wide")
    elif phase is P.MLP_OUT:
        yield from own("wide", shape.mlp)
        yield from tile("middle", writes=False)
        yield from tile("branch2")
        if layer + 1 < shape.layers:
            yield from at("state", columns, own_parts, writes=True, of=layer + 1)
    elif phase is P.GRAD_WIDE:
        yield from own("of_branch2", hidden)
        yield from tile("before", writes=False)
        yield from tile("of_before")
        yield from tile("bias")
    elif phase is P.GRAD_MIXED:
        yield from own("of_branch1", hidden)
        yield from tile("mixed", writes=False)
        yield from tile("of_mixed")
        yield from tile("inner", (columns[0] // head_dim, columns[1] // head_dim))
    elif phase in (P.GRAD_QUERIES, P.GRAD_KEYS):
        first = item.column * head_dim
        head, of_head = (first, first + head_dim), (item.column, item.column + 1)
        keys = [(offset + first, offset + first + head_dim) for offset in (hidden, 2 * hidden)]
        of_keys, of_queries = (own_parts, every_part)
        if phase is P.GRAD_QUERIES:
            of_keys, of_queries = of_queries, of_keys
            yield from tile("of_qkv", head)
        else:
            for span in keys:
                yield from tile("of_qkv", span)
        for span in keys:
            yield from at("qkv", span, of_keys)
        yield from at("qkv", head, of_queries)
        yield from at("of_mixed", head, of_queries)
        for buffer in ("top", "inner"):
            yield from at(buffer, of_head, of_queries)
    else:
        source, width = ("of_before", shape.mlp) if phase is P.GRAD_NORM2 else ("of_qkv", 3 * hidden)
        yield from own(source, width)
        yield from at("of_rows", columns, own_parts, writes=True, of=0)


def _rows(table: BackwardTable, item: Instruction) -> Iterator[Access]:
    """Phases that go through whole rows of one part."""
    phase, layer, last = P(item.phase), item.layer, table.shape.layers - 1
    part = item.row * table.parts + item.column

    def whole(buffer: str, *, writes: bool = False, of: int = layer) -> Access:
        return Access(buffer, of, item.sequence, part, 0, table.shape.hidden, writes)

    first = phase in (P.NORM1, P.BOTTOM)
    if phase is not P.TOP and (layer or not first):
        yield whole("state" if first else "middle")
    if phase in (P.NORM1, P.NORM2):
        yield whole("rows1" if first else "rows2", writes=True)
        return
    if phase is not P.TOP:
        yield whole("of_rows", of=0)
        yield whole("norm1" if first else "norm2", writes=True)
    yield whole("grad", writes=True, of=0)
    if phase is P.MIDDLE:
        branch, of = "1", layer
    else:
        branch, of = "2", last if phase is P.TOP else layer - 1
    if of >= 0:
        yield whole(f"branch{branch}", of=of)
        yield whole(f"of_branch{branch}", writes=True, of=of)
        yield whole(f"gate{branch}", writes=True, of=of)
