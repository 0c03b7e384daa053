"""Index maths, swizzle, barriers and row statistics of the device code, compiled for the host."""

import ctypes
import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest

from loopmdm_kernels.schedule import BlockShape, Forward, Tiles, build
from loopmdm_kernels.schedule.table import FINAL, Instruction, qkv_slot, stream_slot
from loopmdm_kernels.testing.schedule import positions

CSRC = Path(__file__).parents[2] / "csrc"


def tma_box(rows, columns, element_bytes, row_bytes=128):
    """Byte offset of each element after a TMA load with the swizzle of rows of 128, 64 or 32 bytes.

    By the definition: the 16-byte chunk c of a row lies at chunk c xor (r mod 8), with r the number of its
    128 bytes, as far as the row has chunks. Boxes are as wide as a row and lie in order.
    """
    offsets = np.empty((rows, columns), dtype=np.int64)
    per_row = row_bytes // element_bytes
    for row, column in itertools.product(range(rows), range(columns)):
        box, inside = divmod(column, per_row)
        chunk, byte = divmod(inside * element_bytes, 16)
        moved = chunk ^ row * row_bytes // 128 % (row_bytes // 16)
        offsets[row, column] = box * rows * row_bytes + row * row_bytes + 16 * moved + byte
    return offsets


@pytest.mark.parametrize(
    "box", [(64, 64, 4, 128), (128, 64, 2, 128), (24, 192, 2, 128), (64, 32, 2, 64), (128, 32, 2, 32)]
)
def test_panels_lie_as_tma_writes_them(library, box):
    rows, columns, *widths = box
    expected = tma_box(*box)
    places = itertools.product(range(rows), range(columns))
    assert [library.panel_offset_c(r, c, rows, *widths) for r, c in places] == expected.ravel().tolist()
    assert len(np.unique(expected)) == rows * columns


def test_reading_the_stream_has_no_bank_conflicts(library):
    """A warp reads pairs of floats: 256 bytes, which shared memory gives in two passes of distinct banks."""
    for step, reg in itertools.product(range(4), range(4)):
        offsets = [
            library.panel_offset_c(
                library.operand_row_c(lane, reg),
                16 * library.stream_step_c(lane, step) + library.operand_column_c(lane, reg),
                *(64, 4, 128),
            )
            for lane in range(32)
        ]
        for half in (offsets[:16], offsets[16:]):
            banks = [(offset // 4 + word) % 32 for offset in half for word in (0, 1)]
            assert len(set(banks)) == 32


def test_descriptors(library):
    """Fields as the PTX manual names them."""

    def fields(word):
        return {
            "start": (word & 0x3FFF) << 4,
            "leading": (word >> 16 & 0x3FFF) << 4,
            "stride": (word >> 32 & 0x3FFF) << 4,
            "base": word >> 49 & 7,
            "swizzle": word >> 62,
        }

    for step in range(4):
        word = fields(library.inner_major_c(0x8400, step, 128, 1))
        assert word == {"start": 0x8400 + 32 * step, "leading": 16, "stride": 1024, "base": 0, "swizzle": 1}
    word = fields(library.outer_major_c(0x2C00, 16384, 3, 128))
    assert word == {"start": 0x2C00 + 6144, "leading": 16384, "stride": 1024, "base": 0, "swizzle": 1}
    word = fields(library.inner_major_c(0x8400, 1, 64, 1))
    assert word == {"start": 0x8420, "leading": 16, "stride": 512, "base": 0, "swizzle": 2}
    word = fields(library.inner_major_c(0x8400, 1, 128, 2))  # every second atom
    assert word == {"start": 0x8420, "leading": 16, "stride": 2048, "base": 0, "swizzle": 1}
    word = fields(library.outer_major_c(0x2C00, 4096, 3, 32))
    assert word == {"start": 0x2C00 + 1536, "leading": 4096, "stride": 256, "base": 0, "swizzle": 3}


def test_sums_cover_a_tile_once(library):
    for columns in (32, 64, 96, 128, 192):
        seen = {
            (library.fragment_row_c(thread, index), library.fragment_column_c(thread, index))
            for thread in range(128)
            for index in range(columns // 2)
        }
        assert seen == set(itertools.product(range(64), range(columns)))


def test_fragments_lie_as_the_manual_says(library):
    """PTX ISA: row = lane / 4 (+ 8), column = 2 (lane mod 4) + i mod 2; a register of the left operand holds
    (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8)."""
    for thread in range(128):
        row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
        assert [library.fragment_row_c(thread, i) for i in range(4)] == [row, row, row + 8, row + 8]
        assert [library.fragment_column_c(thread, i) for i in range(4, 8)] == [8 + column, 9 + column] * 2
        assert [library.operand_row_c(thread, r) for r in range(4)] == [row, row + 8, row, row + 8]
        assert [library.operand_column_c(thread, r) for r in range(4)] == [
            column,
            column,
            column + 8,
            column + 8,
        ]


def test_sums_become_a_left_operand_in_place(library):
    """Probabilities go from sums of one product to the operand of the next without moving between threads."""
    for thread, step, reg, half in itertools.product(range(128), range(8), range(4), range(2)):
        index = 4 * (2 * step + (reg >> 1)) + 2 * (reg & 1) + half
        assert library.fragment_row_c(thread, index) == library.operand_row_c(thread, reg)
        column = 16 * step + library.operand_column_c(thread, reg) + half
        assert library.fragment_column_c(thread, index) == column


def test_a_quad_exchanges_pairs_for_runs(library):
    """What a lane holds of four groups of columns becomes one group with the columns of all four lanes."""
    words = [[(lane, group) for group in range(4)] for lane in range(4)]
    for bit in (1, 2):
        for low in (word for word in range(4) if not word & bit):
            places = [library.quad_word_c(lane, bit, low) for lane in range(4)]
            given = [words[lane][places[lane]] for lane in range(4)]
            for lane in range(4):
                words[lane][places[lane]] = given[lane ^ bit]
    assert words == [[(holder, lane) for holder in range(4)] for lane in range(4)]


def test_positions_equal_those_of_the_table(library):
    shape = BlockShape(batch=2, length=20, hidden=32, heads=2, mlp=64, layers=3)
    table = build(shape, Tiles(16, 16, 16, 16, 32), adaptive=True)
    items = [*table.enter, *table.loop, *table.leave]
    size = (len(table.enter), len(table.loop), len(table.leave))
    out = (ctypes.c_int32 * 2)()
    for position, (loop, item) in enumerate([*positions(table, 3), *2 * [(3, None)]]):
        library.place_c(ctypes.c_int64(position), *size, 3, out)
        assert out[0] == loop
        assert (None if out[1] < 0 else items[out[1]]) == item
    # Beyond 32 bits: many loops of a large table.
    library.place_c(ctypes.c_int64(5 + 100_000 * 30_000 + 7), 5, 100_000, 9, 40_000, out)
    assert list(out) == [30_000, 12]


@pytest.mark.parametrize("num_blocks", [1, 3, 132])
def test_leaving_early_keeps_to_the_blocks_own_positions(library, num_blocks):
    size, loops = (4, 50, 6), 5
    leaving = size[0] + size[1] * loops
    for position in range(leaving + 10):
        result = library.first_leaving_c(ctypes.c_int64(position), *size, loops, num_blocks)
        assert result == next(p for p in itertools.count(position, num_blocks) if p >= min(leaving, 10**9))


def test_generations_and_halves_equal_those_of_the_table(library):
    for loop, slot, layers in itertools.product(range(-1, 6), (0, 1), (1, 2, 3)):
        assert library.generation_c(7, loop) == 7 * (loop + 1)
        assert library.stream_slot_c(slot, loop, 0) == stream_slot(slot, loop)
        assert library.stream_slot_c(slot, loop, 1) == slot + loop
        assert library.qkv_slot_c(slot, loop, layers) == qkv_slot(slot, loop, layers)


def test_words_and_numbers_are_those_of_the_header(library):
    assert library.instruction_bytes() == 4 * len(Instruction._fields)
    header = (CSRC / "common" / "schedule.h").read_text()
    forward, _ = re.findall(r"enum Phase : int32_t \{(.*?)\}", header, re.DOTALL)
    names = [phase.name.title().replace("_", "") for phase in Forward]
    assert re.findall(r"k(\w+)", forward) == [*names, "End"]
    assert f"kFinal = 0x{FINAL:X}" in header


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7])
def test_a_ring_hands_on_every_item_in_order(library, slots):
    generator = random.Random(slots)
    for bias in (0.1, 0.5, 0.9):
        order = bytes(generator.random() < bias for _ in range(4000))
        taken = ctypes.c_int()
        assert library.run_ring(slots, 100, order, len(order), ctypes.byref(taken)) == 0
        assert taken.value == 100


def test_statistics_of_quarters_are_those_of_all_parts(library):
    """Four lanes add up some of the parts each, the last ones perhaps none, and then pairs of them."""
    generator = np.random.default_rng(1)
    for parts, width in ((2, 32), (4, 32), (7, 32), (24, 32)):
        row = (generator.standard_normal((parts, width)) + 100).astype(np.float32)
        means = row.mean(axis=1)
        given = np.stack([means, ((row - means[:, None]) ** 2).sum(axis=1)], axis=1).astype(np.float32)
        out = (ctypes.c_float * 2)()
        pointer = given.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        library.merge_quarters(pointer, parts, ctypes.c_float(width), out)
        assert out[0] == pytest.approx(row.mean(dtype=np.float64), rel=1e-6)
        assert out[1] == pytest.approx(row.var(dtype=np.float64), rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_of_parts_are_those_of_the_row(library, offset):
    generator = np.random.default_rng(0)
    for parts, width in ((1, 64), (8, 96), (24, 32)):
        row = (generator.standard_normal((parts, width)) + offset).astype(np.float32)
        mean = row.astype(np.float64).mean(1)
        deviations = ((row - mean[:, None]) ** 2).sum(1)
        values = np.stack([mean, deviations], 1).astype(np.float32).ravel()
        out = (ctypes.c_float * 2)()
        pointer = values.ctypes.data_as(ctypes.c_void_p)
        library.merge_parts(pointer, parts, ctypes.c_float(width), out)
        assert out[0] == pytest.approx(row.astype(np.float64).mean(), abs=1e-6 + 2e-7 * offset)
        # Means of parts are rounded to fp32, whose step at the offset the variance cannot see below.
        assert out[1] == pytest.approx(row.astype(np.float64).var(), rel=1e-5 + 1e-6 * offset / 10)
