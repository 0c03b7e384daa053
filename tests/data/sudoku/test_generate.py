"""What the generator makes, and that it makes the same again."""

from __future__ import annotations

import numpy as np
import pytest

from loopmdm.data.sudoku import (
    FOUR,
    NINE,
    SIX,
    SudokuSpec,
    count_solutions,
    encode_boards,
    generate,
    grid_ids,
    is_valid_solution,
    rate,
)

# Shipped checkpoints and their held-out sets depend on these: a change breaks the meaning of every seed.
PINNED = [
    (
        NINE,
        (30, 40),
        "8.53179.263.8.......74.25...91..42......8365.5.......4..35.8.96.6.9..4..1...4.873",
        "845317962632895741917462538391654287274183659586729314423578196768931425159246873",
        5644378425251580420,
    ),
    (
        SIX,
        None,
        "...6.4.6..2..4...6..5..1.3....4..3..",
        "253614164523341256625431536142412365",
        11392392271827705071,
    ),
]


@pytest.mark.parametrize(("spec", "clues", "puzzle", "solution", "id_"), PINNED)
def test_pinned_puzzles(
    spec: SudokuSpec, clues: tuple[int, int] | None, puzzle: str, solution: str, id_: int
) -> None:
    made = generate(spec, 1, seed=7, clues=clues, split="train")
    assert encode_boards(spec, made.clues) == [puzzle]
    assert encode_boards(spec, made.solutions) == [solution]
    assert made.ids.tolist() == [id_]


@pytest.mark.parametrize(
    ("spec", "clues"), [(NINE, (30, 40)), (NINE, (24, 28)), (SIX, (10, 20)), (FOUR, (4, 8))], ids=str
)
def test_puzzles_have_one_solution(spec: SudokuSpec, clues: tuple[int, int]) -> None:
    made = generate(spec, 400, seed=1, clues=clues)
    assert is_valid_solution(spec, made.solutions, made.clues).all()
    assert (count_solutions(spec, made.clues) == 1).all()
    assert set((made.clues > 0).sum(axis=1)) == set(range(clues[0], clues[1] + 1))
    np.testing.assert_array_equal(made.difficulty, rate(spec, made.clues))
    np.testing.assert_array_equal(made.ids, grid_ids(spec, made.solutions))


@pytest.mark.parametrize(("spec", "mean"), [(NINE, 24.4), (SIX, 10.1)], ids=str)
def test_minimal_puzzles(spec: SudokuSpec, mean: float) -> None:
    made = generate(spec, 1000, seed=2, clues=None)
    assert (count_solutions(spec, made.clues) == 1).all()
    assert (made.clues > 0).sum(axis=1).mean() == pytest.approx(mean, abs=0.2)
    for puzzle in made.clues[:20]:
        without_one = np.repeat(puzzle[None], np.count_nonzero(puzzle), axis=0)
        without_one[np.arange(len(without_one)), np.flatnonzero(puzzle)] = 0
        assert (count_solutions(spec, without_one) == 2).all()


def test_a_puzzle_depends_on_seed_and_index_only() -> None:
    many = generate(NINE, 9000, seed=5, clues=(40, 45))
    few = generate(NINE, 50, seed=5, clues=(40, 45), threads=3)
    for whole, part in zip(many, few, strict=True):
        np.testing.assert_array_equal(whole[:50], part)
    threaded = generate(NINE, 9000, seed=5, clues=(40, 45), threads=2)
    np.testing.assert_array_equal(threaded.clues, many.clues)
    other = generate(NINE, 50, seed=6, clues=(40, 45))
    assert (other.solutions != few.solutions).any(axis=1).all()


def test_all_4x4_grids_come_about_equally_often() -> None:
    grids = generate(FOUR, 288 * 200, seed=3, clues=(16, 16)).solutions
    _, counts = np.unique(grids, axis=0, return_counts=True)
    assert len(counts) == 288
    assert ((counts - 200) ** 2 / 200).sum() < 400  # chi-squared with 287 degrees of freedom: 4.7 sigma


def test_6x6_grids_are_not_degenerate() -> None:
    grids = generate(SIX, 100_000, seed=3, clues=(36, 36)).solutions
    names = np.empty((len(grids), 7), np.uint8)
    np.put_along_axis(names, grids[:, :6].astype(int), np.arange(1, 7, dtype=np.uint8)[None], axis=1)
    relabelled = np.take_along_axis(names, grids.astype(int), axis=1)  # first row 1..6: one of 39,168
    kinds = len(np.unique(relabelled, axis=0))
    uniform = 39_168 * (1 - np.exp(-100_000 / 39_168))
    assert kinds > 0.95 * uniform
    shares = (grids[:, :, None] == np.arange(1, 7)).mean(axis=0)
    np.testing.assert_allclose(shares, 1 / 6, atol=0.007)


def test_9x9_cells_are_uniform() -> None:
    grids = generate(NINE, 20_000, seed=3, clues=(81, 81)).solutions
    assert is_valid_solution(NINE, grids).all()
    np.testing.assert_allclose((grids[:, :, None] == np.arange(1, 10)).mean(axis=0), 1 / 9, atol=0.012)


def test_empty_request() -> None:
    assert [array.shape for array in generate(SIX, 0, seed=0, clues=None)] == [(0, 36), (0, 36), (0,), (0,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": -1}, "num must be at least 0"),
        ({"seed": -1}, r"seed must be an integer in 0\.\.2\^63-1, got -1"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"clues": (40, 30)}, r"clues must be \(lo, hi\) with 0 <= lo <= hi"),
        ({"clues": (10, 16)}, r"hi in 17\.\.81 for 9x9, got \(10, 16\)"),
        ({"clues": (80, 82)}, r"hi in 17\.\.81"),
        ({"split": "valid"}, 'split must be "train", "test" or None'),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"num": 1, "seed": 0, "clues": (30, 40)} | change
    with pytest.raises(ValueError, match=message):
        generate(NINE, **arguments)  # type: ignore[arg-type]


def test_clues_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"clues must be \(lo, hi\), \"minimal\" "):
        generate(NINE, 1, seed=0, clues=30)  # type: ignore[arg-type]
