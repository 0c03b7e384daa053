"""The solver against known puzzles, known counts and a slow solver written here."""

from __future__ import annotations

import numpy as np
import pytest

from loopmdm.data.sudoku import FOUR, NINE, SIX, SudokuSpec, count_solutions, generate, rate, solve

# Published puzzles: a 17-clue one of G. Royle's list, A. Inkala's two, "Golden Nugget", and an easy one.
KNOWN = {
    "royle17": (
        "000000010400000000020000000000050407008000300001090000300400200050100000000806000",
        "693784512487512936125963874932651487568247391741398625319475268856129743274836159",
    ),
    "inkala": (
        "800000000003600000070090200050007000000045700000100030001000068008500010090000400",
        "812753649943682175675491283154237896369845721287169534521974368438526917796318452",
    ),
    "escargot": (
        "100007090030020008009600500005300900010080002600004000300000010040000007007000300",
        "162857493534129678789643521475312986913586742628794135356478219241935867897261354",
    ),
    "nugget": (
        "000000039000001005003050800008090006070002000100400000009080050020000600400700000",
        "751846239892371465643259871238197546974562318165438927319684752527913684486725193",
    ),
    "easy": (
        "003020600900305001001806400008102900700000008006708200002609500800203009005010300",
        "483921657967345821251876493548132976729564138136798245372689514814253769695417382",
    ),
}


def cells(text: str) -> np.ndarray:
    return np.array([[int(char) for char in text]], dtype=np.uint8)


def peers(spec: SudokuSpec) -> list[list[int]]:
    units = np.stack(spec.units_of_cells())
    return [
        [j for j in range(spec.cells) if j != i and (units[:, i] == units[:, j]).any()]
        for i in range(spec.cells)
    ]


def brute_force(spec: SudokuSpec, clues: np.ndarray, limit: int = 2) -> list[list[int]]:
    """All solutions up to `limit`: no propagation, the cell with the fewest candidates first."""
    neighbours = peers(spec)
    board = clues.tolist()
    found: list[list[int]] = []

    def options(cell: int) -> list[int]:
        used = {board[other] for other in neighbours[cell]}
        return [digit for digit in range(1, spec.size + 1) if digit not in used]

    def search() -> None:
        blanks = [cell for cell in range(spec.cells) if board[cell] == 0]
        if not blanks:
            found.append(list(board))
            return
        best = min(blanks, key=lambda cell: len(options(cell)))
        for digit in options(best):
            board[best] = digit
            search()
            board[best] = 0
            if len(found) >= limit:
                return

    search()
    return found


def solved_by_singles(spec: SudokuSpec, clues: np.ndarray, hidden: bool) -> bool:
    neighbours, board = peers(spec), clues.tolist()
    units = [np.flatnonzero(of == unit).tolist() for of in spec.units_of_cells() for unit in range(spec.size)]
    progress = True
    while progress:
        progress = False
        free = {
            cell: set(range(1, spec.size + 1)) - {board[other] for other in neighbours[cell]}
            for cell in range(spec.cells)
            if board[cell] == 0
        }
        moves = [(cell, min(digits)) for cell, digits in free.items() if len(digits) == 1]
        if hidden and not moves:
            for unit in units:
                for digit in range(1, spec.size + 1):
                    places = [cell for cell in unit if digit in free.get(cell, ())]
                    moves += [(places[0], digit)] if len(places) == 1 else []
        if moves:
            cell, digit = moves[0]
            board[cell] = digit
            progress = True
    return 0 not in board


@pytest.mark.parametrize("name", KNOWN)
def test_known_puzzles(name: str) -> None:
    puzzle, solution = (cells(text) for text in KNOWN[name])
    assert count_solutions(NINE, puzzle, limit=100).tolist() == [1]
    np.testing.assert_array_equal(solve(NINE, puzzle), solution)


@pytest.mark.parametrize("name", ["royle17", "escargot", "easy"])
def test_known_puzzles_are_unique_by_brute_force(name: str) -> None:
    puzzle, solution = (cells(text)[0] for text in KNOWN[name])
    assert brute_force(NINE, puzzle) == [solution.tolist()]


def test_counts_of_all_grids() -> None:
    assert count_solutions(FOUR, np.zeros((1, 16), np.uint8), limit=10**6).tolist() == [288]
    first_row = np.zeros((1, 36), np.uint8)
    first_row[0, :6] = range(1, 7)
    assert count_solutions(SIX, first_row, limit=10**6).tolist() == [28_200_960 // 720]


def test_count_stops_at_the_limit() -> None:
    assert count_solutions(NINE, np.zeros((2, 81), np.uint8), limit=7).tolist() == [7, 7]


@pytest.mark.parametrize("spec", [FOUR, SIX], ids=str)
def test_counts_agree_with_brute_force(spec: SudokuSpec) -> None:
    puzzles = generate(spec, 12, seed=3, clues=None).clues
    for drop in range(3):  # fewer clues, more solutions
        thinned = puzzles.copy()
        for row in thinned:
            row[np.flatnonzero(row)[:drop]] = 0
        counts = count_solutions(spec, thinned, limit=40)
        assert counts.tolist() == [len(brute_force(spec, row, 40)) for row in thinned]


def test_no_solution() -> None:
    clash = np.zeros((2, 81), np.uint8)
    clash[0, [0, 8]] = 5  # twice in a row
    clash[1, [0, 1, 2, 3, 4, 5, 6, 7, 17]] = [1, 2, 3, 4, 5, 6, 7, 8, 9]  # no digit is left for the corner
    assert count_solutions(NINE, clash).tolist() == [0, 0]
    assert not solve(NINE, clash).any()
    assert rate(NINE, clash)[0] == np.inf


def test_difficulty_scale() -> None:
    puzzles = generate(NINE, 60, seed=4, clues=(23, 32)).clues
    difficulty = rate(NINE, puzzles)
    expected = [
        0 if solved_by_singles(NINE, row, hidden=False) else 1 if solved_by_singles(NINE, row, True) else 2
        for row in puzzles
    ]
    assert np.minimum(np.floor(difficulty), 2).astype(int).tolist() == expected
    assert set(expected) == {0, 1, 2}


def test_difficulty_counts_branching_nodes() -> None:
    grid = cells(KNOWN["easy"][1])
    assert rate(NINE, grid).tolist() == [0]
    # 1 and 2 can trade places in two rows: one guess, two solutions.
    pair = cells("1234341221434321")
    pair[0, [0, 1, 8, 9]] = 0
    assert count_solutions(FOUR, pair).tolist() == [2]
    assert rate(FOUR, pair).tolist() == [2]
    hard = np.concatenate([cells(KNOWN[name][0]) for name in ("inkala", "nugget", "escargot")])
    assert (rate(NINE, hard) > 6).all()


def test_threads_do_not_matter() -> None:
    puzzles = generate(NINE, 200, seed=9, clues=None).clues
    np.testing.assert_array_equal(solve(NINE, puzzles, threads=4), solve(NINE, puzzles))
    np.testing.assert_array_equal(rate(NINE, puzzles, threads=4), rate(NINE, puzzles))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"clues must have shape \[\.\.\., 81\] for 9x9, got \[2, 36\]"):
        solve(NINE, np.zeros((2, 36), np.uint8))
    with pytest.raises(ValueError, match=r"clues must have shape \[N, 81\]"):
        solve(NINE, np.zeros(81, np.uint8))
    with pytest.raises(ValueError, match=r"clues must hold 0\.\.6 for 6x6, got 0\.\.7"):
        rate(SIX, np.full((1, 36), 7) * np.eye(1, 36, dtype=int))
    with pytest.raises(TypeError, match="clues must be an integer array, got dtype float64"):
        solve(NINE, np.zeros((1, 81)))
    with pytest.raises(ValueError, match="limit"):
        count_solutions(NINE, np.zeros((1, 81), np.uint8), limit=0)
    with pytest.raises(ValueError, match="threads"):
        solve(NINE, np.zeros((1, 81), np.uint8), threads=0)
