"""The table itself: its order, its counters, its errors."""

import pytest

from loopmdm_kernels.schedule import BlockShape, Phase, Tiles, build
from loopmdm_kernels.schedule.table import qkv_slot, stream_slot

SHAPE = BlockShape(batch=2, length=20, hidden=32, heads=2, mlp=64, layers=2)
TILES = Tiles(rows=16, qkv=16, attn_out=16, mlp_in=16, mlp_out=32)


def test_positions_run_through_enter_loops_and_leave():
    table = build(SHAPE, TILES)
    numbers = [
        table.position(i, 2) for i in range(len(table.enter) + 2 * len(table.loop) + len(table.leave) + 1)
    ]
    assert [loop for loop, _ in numbers] == [-1] * 4 + [0] * len(table.loop) + [1] * len(table.loop) + [2] * 5
    assert [item for _, item in numbers] == [*table.enter, *table.loop, *table.loop, *table.leave, None]


def test_every_tile_occurs_once():
    table = build(SHAPE, TILES)
    count = {Phase.QKV: 6, Phase.ATTENTION: 2, Phase.ATTN_OUT: 2, Phase.MLP_IN: 4, Phase.MLP_OUT: 1}
    places = [(i.phase, i.layer, i.sequence, i.row, i.column) for i in table.loop]
    assert sorted(places) == sorted(
        (phase, layer, sequence, row, column)
        for phase, columns in count.items()
        for layer in range(2)
        for sequence in range(2)
        for row in range(2)
        for column in range(columns)
    )


def test_halves_alternate():
    assert [stream_slot(0, loop) for loop in range(4)] == [0, 1, 0, 1]
    # Three layers: the half of layer 0 changes from loop to loop; two: it does not.
    assert [qkv_slot(0, loop, 3) for loop in range(4)] == [0, 1, 0, 1]
    assert [qkv_slot(1, loop, 2) for loop in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "tiles", "message"),
    [
        ({}, {"mlp_in": 48}, r"tiles.mlp_in: got 48, expected a divisor of 64"),
        ({}, {"attn_out": 0}, r"tiles.attn_out: got 0"),
        ({}, {"qkv": 24}, r"tiles.qkv: got 24, expected a multiple of the head size 16"),
        ({"layers": 0}, {}, r"layers: got 0, expected at least 1"),
        ({}, {"rows": 0}, r"tiles.rows: got 0"),
    ],
)
def test_errors(shape, tiles, message):
    with pytest.raises(ValueError, match=message):
        build(SHAPE._replace(**shape), TILES._replace(**tiles))
