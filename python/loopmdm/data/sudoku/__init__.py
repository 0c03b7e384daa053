"""Sudoku: boards, puzzles with one solution, splits without leakage, training batches and files."""

from loopmdm.data.sudoku.batches import SudokuData, grid_positions
from loopmdm.data.sudoku.boards import (
    FOUR,
    NINE,
    SIX,
    SudokuSpec,
    complete_units,
    format_board,
    has_contradiction,
    is_valid_solution,
    spec,
)
from loopmdm.data.sudoku.files import PuzzleFile, encode_boards, parse_puzzles, read_puzzles, write_puzzles
from loopmdm.data.sudoku.puzzles import (
    Puzzles,
    count_solutions,
    generate,
    grid_ids,
    in_test_split,
    rate,
    solve,
)

__all__ = [
    "FOUR",
    "NINE",
    "SIX",
    "PuzzleFile",
    "Puzzles",
    "SudokuData",
    "SudokuSpec",
    "complete_units",
    "count_solutions",
    "encode_boards",
    "format_board",
    "generate",
    "grid_ids",
    "grid_positions",
    "has_contradiction",
    "in_test_split",
    "is_valid_solution",
    "parse_puzzles",
    "rate",
    "read_puzzles",
    "solve",
    "spec",
    "write_puzzles",
]
