"""Race times and the order of tiles of the vocabulary kernels, compiled for the host."""

import ctypes
import itertools
import math

import pytest

TOGETHER = 16  # kRowTilesTogether


def test_small_race_times_keep_their_precision(library):
    """Down to 2^-65, where 1 - u is 1 in any precision."""
    limit = library.small_uniform()
    for u in [limit * 2.0 ** (-k / 7) for k in range(1, 430)]:
        single = ctypes.c_float(u).value
        assert library.small_race_time_c(single) == pytest.approx(-math.log1p(-single), rel=2.5e-7)


def test_above_the_limit_a_fast_logarithm_is_precise(library):
    """lg2.approx is wrong by 2^-22 at most near 1, which is little beside log2(1 - u) from here on."""
    assert 2.0**-22 / -math.log2(1 - library.small_uniform()) < 1.3e-6


@pytest.mark.parametrize("high", [0, 1, 77, 255, 256, 12345, 2**31 + 5, 2**32 - 1])
def test_uniforms(library, high):
    if high >= 256:
        assert library.uniform_coarse_c(high) == pytest.approx((high + 0.5) * 2.0**-32, rel=2.0**-23)
    for low in (0, 5, 2**31, 2**32 - 1):
        exact = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
        assert library.uniform_refined_c(high, low) == pytest.approx(exact, rel=2.0**-22)


@pytest.mark.parametrize(("row_tiles", "column_tiles"), [(1, 7), (16, 3), (17, 5), (40, 197)])
def test_every_tile_comes_once_and_rows_meet_a_column_together(library, row_tiles, column_tiles):
    out = (ctypes.c_int32 * 2)()
    order = []
    for number in range(row_tiles * column_tiles):
        library.tile_c(number, row_tiles, column_tiles, out)
        order.append(tuple(out))
    assert sorted(order) == list(itertools.product(range(row_tiles), range(column_tiles)))
    assert [column for _, column in order[: min(row_tiles, TOGETHER)]] == [0] * min(row_tiles, TOGETHER)
    groups = [(row // TOGETHER, column) for row, column in order]
    assert groups == sorted(groups)
