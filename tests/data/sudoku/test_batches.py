"""Training batches: valid, of the train split, a pure function of their numbers."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch

from loopmdm.data.sudoku import (
    FOUR,
    NINE,
    SIX,
    SudokuData,
    SudokuSpec,
    count_solutions,
    generate,
    grid_ids,
    grid_positions,
    in_test_split,
    is_valid_solution,
)

CASES = [(NINE, "full"), (NINE, (30, 40)), (NINE, None), (SIX, "full"), (SIX, (10, 16)), (SIX, None)]


@pytest.mark.parametrize(("spec", "clues"), CASES, ids=str)
def test_batches_are_valid_train_puzzles(spec: SudokuSpec, clues: tuple[int, int] | str | None) -> None:
    data = SudokuData(spec, seed=1, clues=clues, pool_size=500, batch_size=300)
    tokens, prompt = data.batch(5)
    assert (tokens.dtype, prompt.dtype) == (torch.int64, torch.bool)
    assert tokens.shape == prompt.shape == (300, spec.cells)
    grids = (tokens + 1).numpy().astype(np.uint8)
    assert is_valid_solution(spec, grids).all()
    assert not in_test_split(grid_ids(spec, grids)).any()
    counts = prompt.sum(dim=1)
    if clues == "full":
        assert not prompt.any()
        return
    assert (count_solutions(spec, np.where(prompt.numpy(), grids, 0)) == 1).all()
    if isinstance(clues, tuple):
        assert set(counts.tolist()) == set(range(clues[0], clues[1] + 1))


@pytest.mark.parametrize(("spec", "clues"), CASES, ids=str)
def test_batches_are_a_pure_function(spec: SudokuSpec, clues: tuple[int, int] | str | None) -> None:
    def make(seed: int = 1) -> SudokuData:
        return SudokuData(spec, seed=seed, clues=clues, pool_size=50, batch_size=16)

    data = make()
    data.batch(2)
    tokens, prompt = data.batch(7, 1, 2)
    again, prompt_again = make().batch(7, 1, 2)
    assert torch.equal(tokens, again)
    assert torch.equal(prompt, prompt_again)
    part, _ = data.batch(7, 1, 2, batch_size=5)
    assert torch.equal(part, tokens[:5])
    others = [data.batch(8, 1, 2), data.batch(7, 0, 2), data.batch(7, 1, 0), data.batch(1, 7, 2)]
    for other, _ in [*others, make(seed=2).batch(7, 1, 2)]:
        assert (other != tokens).any(dim=1).all()


def test_images_are_the_whole_orbit_less_the_test_grids() -> None:
    data = SudokuData(FOUR, seed=4, clues=None, pool_size=1)
    tokens, _ = data.batch(0, batch_size=20_000)
    seen = {tuple(row) for row in (tokens + 1).tolist()}
    start = np.array(next(iter(seen))).reshape(4, 4)
    lines = [
        [2 * band + inside[band][i] for band in bands for i in range(2)]
        for bands in permutations(range(2))
        for inside in product(permutations(range(2)), repeat=2)
    ]
    orbit = set()
    for rows, cols, digits in product(lines, lines, permutations(range(1, 5))):
        image = np.array([0, *digits])[start[rows][:, cols]]
        orbit |= {tuple(image.ravel().tolist()), tuple(image.T.ravel().tolist())}
    boards = np.array(sorted(orbit), dtype=np.uint8)
    train = boards[~in_test_split(grid_ids(FOUR, boards))]
    assert seen == {tuple(row) for row in train.tolist()}
    assert len(train) < len(boards)


def test_a_9x9_pool_of_one_keeps_its_class_and_moves_its_clues() -> None:
    data = SudokuData(NINE, seed=6, clues=None, pool_size=1)
    tokens, prompt = data.batch(0, batch_size=2000)
    source = generate(NINE, 1, seed=6, clues=None, split="train")
    assert set(grid_ids(NINE, (tokens + 1).numpy().astype(np.uint8)).tolist()) == set(source.ids.tolist())
    assert len(torch.unique(tokens, dim=0)) == 2000
    np.testing.assert_allclose(prompt.float().mean(dim=0), prompt.float().mean(), atol=0.06)
    assert set(prompt.sum(dim=1).tolist()) == {int((source.clues > 0).sum())}


def test_grid_positions() -> None:
    table = grid_positions(NINE, 512, seed=3, scale=0.5)
    assert table.shape == (81, 512)
    assert table.dtype == torch.float32
    assert torch.equal(table, grid_positions(NINE, 512, seed=3, scale=0.5))
    assert not torch.equal(table, grid_positions(NINE, 512, seed=4, scale=0.5))
    assert table.std().item() == pytest.approx(0.5, rel=0.05)
    unit = torch.nn.functional.normalize(table, dim=1)
    cosine = unit @ unit.T
    groups = torch.from_numpy(np.stack(NINE.units_of_cells()))
    shared = (groups[:, :, None] == groups[:, None, :]).sum(
        dim=0
    )  # how many of row, column, box two cells share
    assert cosine[shared == 1].mean().item() == pytest.approx(1 / 3, abs=0.05)
    assert cosine[shared == 2].mean().item() == pytest.approx(2 / 3, abs=0.05)
    assert cosine[shared == 0].mean().item() == pytest.approx(0, abs=0.05)
    # Nothing but a row, a column and a box in a cell: mixed differences inside a box vanish.
    grid = table.reshape(9, 9, -1)
    torch.testing.assert_close(grid[0, 0] - grid[0, 1] - grid[1, 0] + grid[1, 1], torch.zeros(512))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"clues must be .* got 'all'"):
        SudokuData(NINE, seed=0, clues="all")
    with pytest.raises(ValueError, match="pool_size"):
        SudokuData(NINE, seed=0, pool_size=0)
    data = SudokuData(SIX, seed=0)
    with pytest.raises(ValueError, match="step must be an integer"):
        data.batch(-1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        data.batch(0, batch_size=0)
