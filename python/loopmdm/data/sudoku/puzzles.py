"""Puzzles with one solution, their difficulty, and the split each belongs to.

A puzzle's split depends on its solution alone, so no puzzle of a test grid can be trained on:

- 9x9: on a 64-bit fingerprint that all 2 * 6^8 * 9! images of a grid under relabelling, row and column moves
  and transposition share. No image of a test grid is ever in the train split.
- 6x6 and 4x4: on a hash of the exact grid. The 28,200,960 grids of 6x6 fall in a few dozen classes only, so
  there every class is in both splits and only exact grids are held out.

One id in 16 is test.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopmdm import _sudoku
from loopmdm.data.sudoku.boards import Cells, SudokuSpec, check_cells
from loopmdm.data.sudoku.clues import Clues, as_clues
from loopmdm_kernels.values import whole

_SPLITS = {None: -1, "train": 0, "test": 1}
_CHUNK = 4096  # puzzles per call of the generator, so that Ctrl-C works between calls


class Puzzles(NamedTuple):
    """N puzzles: clues and solutions uint8 [N, cells], difficulty float32 [N], ids uint64 [N]."""

    clues: Cells
    solutions: Cells
    difficulty: NDArray[np.float32]
    ids: NDArray[np.uint64]


def generate(
    spec: SudokuSpec,
    num: int,
    *,
    seed: int,
    clues: Clues | None,
    split: str | None = None,
    threads: int = 1,
) -> Puzzles:
    """`num` random puzzles with exactly one solution.

    Puzzle i depends on (seed, i) and the other settings, never on `num` or `threads`.

    clues: "minimal" or None, (lo, hi), or "full", as `as_clues` says.
    split: "train", "test", or None for both.
    """
    solutions, given = generate_cells(spec, num, seed=seed, clues=clues, split=split, threads=threads)
    return Puzzles(
        given, solutions, rate(spec, given, threads=threads), grid_ids(spec, solutions, threads=threads)
    )


def generate_cells(
    spec: SudokuSpec,
    num: int,
    *,
    seed: int,
    clues: Clues | None,
    split: str | None,
    threads: int,
) -> tuple[Cells, Cells]:
    """The solutions and the clues of `generate`, without difficulty and ids."""
    if num < 0:
        raise ValueError(f"num must be at least 0, got {num}")
    if split not in _SPLITS:
        raise ValueError(f'split must be "train", "test" or None, got {split!r}')
    wanted = as_clues(spec, clues)
    words = {"minimal": (0, 0), "full": (spec.cells, spec.cells)}
    fewest, most = words[wanted] if isinstance(wanted, str) else wanted
    solutions = np.empty((num, spec.cells), dtype=np.uint8)
    given = np.empty_like(solutions)
    for first in range(0, num, _CHUNK):
        part = slice(first, min(first + _CHUNK, num))
        given[part], solutions[part] = _sudoku.generate(
            spec.box_rows,
            spec.box_cols,
            seed=as_seed(seed),
            first=first,
            num=part.stop - first,
            fewest=fewest,
            most=most,
            minimal=wanted == "minimal",
            split=_SPLITS[split],
            threads=_threads(threads),
        )
    return solutions, given


def solve(spec: SudokuSpec, clues: ArrayLike, *, threads: int = 1) -> Cells:
    """A solution of each puzzle [N, cells], uint8 [N, cells]; zeros where there is none."""
    return _search(spec, clues, 1, threads)[0]


def count_solutions(
    spec: SudokuSpec, clues: ArrayLike, *, limit: int = 2, threads: int = 1
) -> NDArray[np.int32]:
    """How many solutions each puzzle [N, cells] has, counted up to `limit`, int32 [N]."""
    if not 1 <= limit < 2**31:
        raise ValueError(f"limit must be in 1..2^31-1, got {limit}")
    return _search(spec, clues, limit, threads)[1]


def rate(spec: SudokuSpec, clues: ArrayLike, *, threads: int = 1) -> NDArray[np.float32]:
    """The difficulty of each puzzle [N, cells], float32 [N].

    0: cells with one candidate left, filled again and again, solve it (naked singles). 1: digits with one
    place left in a row, column or box are needed too (hidden singles). 2 + log2(b): a search is needed, b
    being the nodes at which the full search (fewest candidates first, singles between) guesses, proof of
    uniqueness included. inf: two clues contradict each other.
    """
    return _sudoku.difficulty(spec.box_rows, spec.box_cols, _boards(spec, clues), threads=_threads(threads))


def grid_ids(spec: SudokuSpec, solutions: ArrayLike, *, threads: int = 1) -> NDArray[np.uint64]:
    """The id of each full grid [N, cells], uint64 [N]: its class at 9x9, the exact grid elsewhere."""
    grids = _boards(spec, solutions, "solutions", blanks=False)
    return _sudoku.grid_ids(spec.box_rows, spec.box_cols, grids, threads=_threads(threads))


def in_test_split(ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which ids [N] belong to the test split."""
    return _sudoku.in_test_split(np.ascontiguousarray(ids, dtype=np.uint64))


def _search(spec: SudokuSpec, clues: ArrayLike, limit: int, threads: int) -> tuple[Cells, NDArray[np.int32]]:
    boards = _boards(spec, clues)
    return _sudoku.solve(spec.box_rows, spec.box_cols, boards, limit=limit, threads=_threads(threads))


def _boards(spec: SudokuSpec, cells: ArrayLike, name: str = "clues", *, blanks: bool = True) -> Cells:
    array = check_cells(spec, cells, name, blanks=blanks)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [N, {spec.cells}], got {list(array.shape)}")
    return array


def _threads(threads: int) -> int:
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads must be in 1..1024, got {threads}")
    return threads


def as_seed(value: Any, name: str = "seed") -> int:
    """`value` as an int in 0..2^63-1."""
    seed = whole(value)
    if seed is None or not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be an integer in 0..2^63-1, got {value!r}")
    return seed
