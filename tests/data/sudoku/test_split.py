"""The split of a grid: the same for all its images at 9x9, of the exact grid elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.data.sudoku import (
    FOUR,
    NINE,
    SIX,
    SudokuSpec,
    generate,
    grid_ids,
    in_test_split,
    is_valid_solution,
)

THREE = st.permutations(range(3))
LINES = st.tuples(THREE, st.tuples(THREE, THREE, THREE)).map(
    lambda bands: [3 * band + bands[1][band][i] for band in bands[0] for i in range(3)]
)


@pytest.fixture(scope="module")
def grids() -> np.ndarray:
    return generate(NINE, 20_000, seed=8, clues=(81, 81)).solutions


@given(
    index=st.integers(0, 19_999),
    rows=LINES,
    cols=LINES,
    digits=st.permutations(range(1, 10)),
    transpose=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_9x9_id_is_invariant(
    grids: np.ndarray, index: int, rows: list[int], cols: list[int], digits: list[int], transpose: bool
) -> None:
    grid = grids[index].reshape(9, 9)
    image = np.array([0, *digits], np.uint8)[grid[rows][:, cols]]
    image = image.T if transpose else image
    ids = grid_ids(NINE, np.stack([grid.ravel(), image.ravel()]))
    assert ids[0] == ids[1]


def test_9x9_id_separates_classes(grids: np.ndarray) -> None:
    # 5,472,730,538 classes: 20,000 random grids hold 0.04 equivalent pairs on average.
    assert len(np.unique(grid_ids(NINE, grids))) >= 19_998


def test_9x9_id_sees_a_small_change(grids: np.ndarray) -> None:
    """Two digits that can trade places in the first two rows: the other grid is of another class."""
    before, after = [], []
    for grid in grids[:3000].reshape(-1, 9, 9):
        crossed = (grid[0][:, None] == grid[1]) & (grid[1][:, None] == grid[0])
        for a, b in np.argwhere(np.triu(crossed))[:1]:
            other = grid.copy()
            other[:2, [a, b]] = grid[:2, [b, a]]
            before.append(grid.ravel())
            after.append(other.ravel())
    assert len(before) > 300
    assert is_valid_solution(NINE, np.stack(after)).all()
    assert (grid_ids(NINE, np.stack(before)) != grid_ids(NINE, np.stack(after))).mean() > 0.98


@pytest.mark.parametrize("spec", [FOUR, SIX], ids=str)
def test_smaller_boards_hold_out_exact_grids(spec: SudokuSpec) -> None:
    made = generate(spec, 50_000, seed=1, clues=(spec.cells, spec.cells))
    distinct = np.unique(made.solutions, axis=0)
    ids = grid_ids(spec, distinct)
    assert len(np.unique(ids)) == len(distinct)


@pytest.mark.parametrize("spec", [NINE, SIX], ids=str)
def test_one_grid_in_sixteen_is_test(spec: SudokuSpec) -> None:
    ids = generate(spec, 20_000, seed=2, clues=(spec.cells, spec.cells)).ids
    assert in_test_split(ids).mean() == pytest.approx(1 / 16, abs=0.006)


@pytest.mark.parametrize("spec", [NINE, SIX, FOUR], ids=str)
@pytest.mark.parametrize("split", ["train", "test"])
def test_generate_keeps_to_its_split(spec: SudokuSpec, split: str) -> None:
    made = generate(spec, 300, seed=3, clues=None, split=split)
    assert (in_test_split(made.ids) == (split == "test")).all()


def test_full_grids_only() -> None:
    with pytest.raises(ValueError, match=r"solutions must hold 1\.\.9 for 9x9, got 0\.\.0"):
        grid_ids(NINE, np.zeros((1, 81), np.uint8))
