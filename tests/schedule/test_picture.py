"""The picture in the documents is that of the schedule."""

import itertools
import re
from pathlib import Path

import pytest

from bench import draw_schedule, hopper_model
from loopmdm_kernels.schedule import Device, Forward, backward, build, choose, choose_rows, forward

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "kernels" / "looped_blocks.md"


def test_the_committed_picture_is_drawn_from_this_schedule():
    assert (DOCS / "schedule.svg").read_text() == draw_schedule.draw(), (
        "python -m bench.draw_schedule docs/schedule.svg"
    )


@pytest.mark.parametrize("phases", [forward.PHASES, backward.PHASES], ids=["forward", "backward"])
def test_the_tables_of_phases_are_those_of_the_schedule(phases):
    assert draw_schedule.table_of(phases) in PAGE.read_text(), "python -m bench.draw_schedule prints them"


def test_the_simulation_keeps_to_blocks_and_waits():
    plan = choose(draw_schedule.SHAPE)
    table = build(draw_schedule.SHAPE, plan.tiles)
    for blocks in (1, 7, 48):
        tiles = draw_schedule.simulate(table, plan, blocks)
        assert len(tiles) == len(table.loop)
        for block in range(blocks):
            own = [tile for tile in tiles if tile.block == block]
            assert all(a.end <= b.start for a, b in itertools.pairwise(own))
        attention = [
            tile.start for tile in tiles if tile.item.phase == Forward.ATTENTION and tile.item.layer == 0
        ]
        products = [tile.end for tile in tiles if tile.item.phase == Forward.QKV and tile.item.layer == 0]
        assert min(attention) >= max(products)


def test_the_page_has_what_the_model_says():
    for rows in (hopper_model.case_rows(), hopper_model.mechanism_rows()):
        assert hopper_model.table(rows) in PAGE.read_text(), "python -m bench.hopper_model prints the tables"


def test_the_page_has_what_a_layer_of_narrow_blocks_takes():
    (last,) = re.findall(r"^\| both, by stages of the ring \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    layers, seconds = hopper_model.SUDOKU.layers, choose_rows(hopper_model.SUDOKU).loop_seconds
    assert last == f"{1e6 * seconds / layers:.2f}"


def test_a_range_holds_what_is_assumed_and_moves_the_figures_both_ways():
    ranges = hopper_model.RANGES
    assert set(ranges) <= set(Device._fields)
    assert all(low < getattr(Device(), field) < high for field, (low, high) in ranges.items())
    for case in hopper_model.cases():
        assumed = case.microseconds(Device())
        for field, (low, high) in ranges.items():
            ends = [case.microseconds(Device()._replace(**{field: value})) for value in (low, high)]
            slow, fast = ends if field.endswith(("bytes", "flops", "share")) else reversed(ends)
            assert fast <= assumed <= slow
