"""How many clues puzzles have: the same words on the command line, in Python and in the generator in C++."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from loopmdm.data.sudoku.boards import SudokuSpec

_ACCEPTED = 'clues must be (lo, hi), "minimal" (or None) or "full" (or "none")'
Clues: TypeAlias = tuple[int, int] | Literal["minimal", "full"]


def as_clues(spec: SudokuSpec, clues: Any) -> Clues:
    """What an argument means.

    - "minimal", or None: no clue can go; about 24.4 clues at 9x9 and 10.1 at 6x6.
    - (lo, hi): aimed uniformly at lo..hi and never above hi. Below about 22 clues at 9x9 a puzzle takes many
      tries (20 is about the least within reach).
    - "full", or "none": a full grid. As a training board it has no prompt, and is masked anywhere.

    Raises:
        ValueError, TypeError: it means none of these, or no puzzle of this board has so many clues.
    """
    if clues is None or clues == "minimal":
        return "minimal"
    if isinstance(clues, str):
        if clues not in ("full", "none"):
            raise ValueError(f"{_ACCEPTED}, got {clues!r}")
        return "full"
    if not isinstance(clues, (tuple, list)) or len(clues) != 2:
        raise TypeError(f"{_ACCEPTED}, got {clues!r}")
    fewest, most = clues
    if not 0 <= fewest <= most <= spec.cells or most < spec.min_clues:
        raise ValueError(
            f"clues must be (lo, hi) with 0 <= lo <= hi and hi in {spec.min_clues}..{spec.cells} for {spec}, "
            f"got {clues!r}"
        )
    return fewest, most


def parse_clues(text: str, spec: SudokuSpec) -> Clues:
    """The clues of training boards that `loopmdm train --clues` names.

    Raises:
        ValueError: neither a word of `as_clues` nor two counts that a puzzle of this size can have.
    """
    if text in ("minimal", "full", "none"):
        return as_clues(spec, text)
    low, _, high = text.partition(":")
    if low.isdecimal() and high.isdecimal() and spec.min_clues <= int(low) <= int(high) <= spec.cells:
        return int(low), int(high)
    raise ValueError(
        f"--clues: got {text!r}, expected minimal, full or LO:HI with"
        f" {spec.min_clues} <= LO <= HI <= {spec.cells}"
    )
