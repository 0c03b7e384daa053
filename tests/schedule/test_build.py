"""The table itself: its order, its counters, its errors."""

import pytest

from loopmdm_kernels.schedule import BlockShape, Forward, Tiles, build
from loopmdm_kernels.schedule.table import qkv_slot, stream_slot
from loopmdm_kernels.testing.schedule import positions

SHAPE = BlockShape(batch=2, length=20, hidden=32, heads=2, mlp=64, layers=2)
TILES = Tiles(rows=16, qkv=16, attn_out=16, mlp_in=16, mlp_out=32)


def test_positions_run_through_enter_loops_and_leave():
    table = build(SHAPE, TILES)
    numbers = positions(table, 2)
    assert [loop for loop, _ in numbers] == [-1] * 4 + [0] * len(table.loop) + [1] * len(table.loop) + [2] * 4
    assert [item for _, item in numbers] == [*table.enter, *table.loop, *table.loop, *table.leave]


def test_every_tile_occurs_once():
    table = build(SHAPE, TILES)
    count = {Forward.QKV: 6, Forward.ATTENTION: 2, Forward.ATTN_OUT: 2, Forward.MLP_IN: 4, Forward.MLP_OUT: 1}
    places = [(i.phase, i.layer, i.sequence, i.row, i.column) for i in table.loop]
    assert sorted(places) == sorted(
        (phase, layer, sequence, row, column)
        for phase, columns in count.items()
        for layer in range(2)
        for sequence in range(2)
        for row in range(2)
        for column in range(columns)
    )


def test_parts_of_a_product_and_their_sums():
    """The parts raise one counter, their sums the one that the next layer waits for."""
    table = build(SHAPE, TILES._replace(mlp_out=16, mlp_out_parts=4, sum_rows=8))
    parts = [item for item in table.loop if item.phase == Forward.MLP_OUT and item.layer == 1]
    sums = [item for item in table.loop if item.phase == Forward.MLP_SUM and item.layer == 1]
    places = [(s, r, p, c) for s in range(2) for r in range(2) for p in range(4) for c in range(2)]
    assert [(i.sequence, i.row, i.part, i.column) for i in parts] == places
    for item in sums:
        assert (
            item.wait == table.counter(Forward.MLP_OUT, 1, item.sequence, item.row) and item.wait_count == 8
        )
        assert item.signal == table.counter(Forward.MLP_SUM, 1, item.sequence, item.row)
    for item in [*table.leave, *(i for i in table.loop if i.phase == Forward.QKV and i.layer == 0)]:
        assert (
            item.wait == table.counter(Forward.MLP_SUM, 1, item.sequence, item.row) and item.wait_count == 2
        )
    assert table.num_counters == 2 * 6 * 4 and build(SHAPE, TILES).num_counters == 2 * 5 * 4


def test_rows_are_normalised_once_for_all_of_their_tiles():
    """A norm's parts raise the counter that the products of these rows wait for."""
    table = build(SHAPE, TILES._replace(part=4))
    for norm, product, before in (
        (Forward.NORM1, Forward.QKV, Forward.MLP_OUT),
        (Forward.NORM2, Forward.MLP_IN, Forward.ATTN_OUT),
    ):
        norms = [item for item in table.loop if item.phase == norm and item.layer == 1]
        places = [(s, r, c) for s in range(2) for r in range(2) for c in range(4)]
        assert [(i.sequence, i.row, i.column) for i in norms] == places
        layer = 0 if norm is Forward.NORM1 else 1
        assert all(i.wait == table.counter(before, layer, i.sequence, i.row) for i in norms)
        products = [item for item in table.loop if item.phase == product and item.layer == 1]
        assert all(
            i.wait == table.counter(norm, 1, i.sequence, i.row) and i.wait_count == 4 for i in products
        )
    without = build(SHAPE, TILES)
    assert {item.phase for item in table.loop} - {item.phase for item in without.loop} == {
        Forward.NORM1, Forward.NORM2
    }  # fmt: skip


def test_sums_normalise_the_rows_of_the_next_layer():
    """So QKV has no norm in front, and waits for them; in the first loop for ENTER, by the same counter."""
    table = build(SHAPE, TILES._replace(part=4, mlp_out_parts=2, sum_rows=2))
    assert {item.phase for item in table.loop if item.layer == 0} == set(Forward) - {
        Forward.ENTER, Forward.NORM1, Forward.EXIT, Forward.LEAVE
    }  # fmt: skip
    sums = [item for item in table.loop if item.phase == Forward.MLP_SUM and item.layer == 1]
    assert [(i.row, i.column) for i in sums if i.sequence == 0] == [(r, c) for r in (0, 1) for c in range(8)]
    first = next(item for item in table.loop if item.phase == Forward.QKV and item.layer == 0)
    assert first.wait == sums[0].signal == table.enter[0].signal
    assert first.wait_count == 8 == table.enter[0].signal_count


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
        ({}, {"part": 3}, r"tiles.part: got 3, expected 0 or a divisor of tiles.rows 16"),
        ({}, {"sum_rows": 5}, r"tiles.sum_rows: got 5, expected 0 or a divisor of tiles.rows 16"),
        ({}, {"mlp_out_parts": 3}, r"tiles.mlp_out_parts: got 3, expected a divisor of 64"),
        ({}, {"blocks": 3}, r"tiles.blocks: got 3, expected 1, 2 or 4 and a divisor of tiles.rows 16"),
    ],
)
def test_errors(shape, tiles, message):
    with pytest.raises(ValueError, match=message):
        build(SHAPE._replace(**shape), TILES._replace(**tiles))
