"""Makes the instruction table of a shape."""

from __future__ import annotations

from loopmdm_kernels.schedule.table import BlockShape, Instruction, Phase, Table, Tiles


def build(shape: BlockShape, tiles: Tiles, *, adaptive: bool = False) -> Table:
    """The table of a shape. Neither the number of thread blocks nor that of loops is part of it.

    Args:
        adaptive: sequences may stop after any loop; adds an EXIT instruction for each.

    Raises:
        ValueError: a width is no multiple of its tile.
    """
    _check(shape, tiles)
    table = Table(shape, tiles, adaptive, (), (), ())
    rows, last, parts = table.row_tiles, shape.layers - 1, tiles.mlp_out_parts
    final = table.layer_phases[-1]
    columns = {
        Phase.QKV: 3 * shape.hidden // tiles.qkv,
        Phase.ATTENTION: -(-shape.heads // tiles.heads),
        Phase.ATTN_OUT: shape.hidden // tiles.attn_out,
        Phase.MLP_IN: shape.mlp // tiles.mlp_in,
        Phase.MLP_OUT: shape.hidden // tiles.mlp_out,
        Phase.MLP_SUM: shape.hidden // tiles.mlp_out,
    }
    signals = {**columns, Phase.MLP_OUT: parts * columns[Phase.MLP_OUT]}  # to a counter, in each loop

    def tile(phase: Phase, layer: int, sequence: int, row: int, column: int, part: int = 0) -> Instruction:
        # A phase reads the tiles of the one before it; the loop's first one those of the loop before.
        before = Phase(phase - 1) if phase is not Phase.QKV else final
        before_layer = (layer or shape.layers) - 1 if phase is Phase.QKV else layer
        every_row = phase is Phase.ATTENTION  # keys and values come from all rows
        return Instruction(
            phase=phase,
            layer=layer,
            sequence=sequence,
            row=row,
            column=column,
            wait=table.counter(before, before_layer, sequence, 0 if every_row else row),
            wait_number=rows if every_row else 1,
            wait_count=signals[before],
            signal=table.counter(phase, layer, sequence, row),
            signal_count=1,
            read_slot=slots(phase, layer)[0],
            write_slot=slots(phase, layer)[1],
            part=part,
        )

    def slots(phase: Phase, layer: int) -> tuple[int, int]:
        # The first layer's ATTN_OUT moves the stream to the other half; from there it is updated in place.
        stream = 0 if layer == 0 else 1
        return {
            Phase.QKV: (stream, layer & 1),
            Phase.ATTENTION: (layer & 1, 0),
            Phase.ATTN_OUT: (stream, 1),
            Phase.MLP_IN: (1, 0),
            Phase.MLP_OUT: (1, 1),
            Phase.MLP_SUM: (1, 1),
        }[phase]

    places = [(sequence, row) for sequence in range(shape.batch) for row in range(rows)]
    loop = [
        tile(phase, layer, sequence, row, column, part)
        for layer in range(shape.layers)
        for phase in table.layer_phases
        for sequence, row in places
        for part in range(parts if phase is Phase.MLP_OUT else 1)
        for column in range(columns[phase])
    ]
    done = signals[final]
    if adaptive:
        loop[:0] = [
            Instruction(
                Phase.EXIT, last, sequence, 0, 0,
                table.counter(final, last, sequence, 0), rows, done, -1, 0, 0, 0,
            )
            for sequence in range(shape.batch)
        ]  # fmt: skip
    enter = [
        Instruction(
            Phase.ENTER, 0, sequence, row, 0,
            -1, 0, 0, table.counter(final, last, sequence, row), done, 0, 1,
        )
        for sequence, row in places
    ]  # fmt: skip
    leave = [
        Instruction(
            Phase.LEAVE, last, sequence, row, 0,
            table.counter(final, last, sequence, row), 1, done, -1, 0, 0, 0,
        )
        for sequence, row in places
    ]  # fmt: skip
    return table._replace(enter=tuple(enter), loop=tuple(loop), leave=tuple(leave))


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
    for name, value in (*shape._asdict().items(), ("tiles.rows", tiles.rows), ("tiles.heads", tiles.heads)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
