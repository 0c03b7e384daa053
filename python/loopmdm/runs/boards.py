"""Sudoku on the command line: held-out puzzles, and shares solved at several loop counts and orders."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from loopmdm.data.batches import Batch
from loopmdm.data.raw import decode
from loopmdm.data.sudoku import (
    NINE,
    PuzzleFile,
    Puzzles,
    SudokuSpec,
    generate,
    parse_puzzles,
    read_puzzles,
)
from loopmdm.data.sudoku.boards import Cells
from loopmdm.data.sudoku.clues import Clues
from loopmdm.data.sudoku.layouts import looks_like_board
from loopmdm.model import LoopMDM
from loopmdm.plan import ComputePlan, as_plan
from loopmdm.quality.cost import Cost
from loopmdm.sampling import Decoding, SampleResult
from loopmdm.solve import SolveResult, solve_with
from loopmdm.terminal import note, note_waiting

ORDERS = ("left_to_right", "confidence")
HELD_OUT_SEED = 20_000
SEVERAL = 2  # solutions of a puzzle are counted up to here
_BATCH = 64
_LINES_NAMED = 10
SHARE_COLUMNS = ("order", "loops S", "solved", "± s.e.", "network calls", "loops run", "seconds")


class Solved(NamedTuple):
    """All puzzles solved in one way."""

    decoding: Decoding
    result: SolveResult
    blanks: int  # cells that were filled
    precision: torch.dtype  # of the network's products
    counted: NDArray[np.bool_] | None = None  # [N] puzzles that the share is of; None: all
    seeds: Mapping[str, int] = MappingProxyType({})  # of what was drawn before

    def to_dict(self) -> dict[str, Any]:
        result = self.result
        return {
            "order": self.decoding.order,
            "num_loops": self.num_loops,
            "plan": str(self.decoding.plan),
            "puzzles": len(self._solved),
            "share_solved": None if math.isnan(self.share) else self.share,
            "stderr": None if math.isnan(self.stderr) else self.stderr,
            "network_calls": int(result.network_calls.sum()),
            "loops": int(result.loops.sum()),
            "seconds": result.seconds,
            "cost": self.cost.to_dict(),
        }

    @property
    def cost(self) -> Cost:
        decoding = self.decoding
        seeds = {"digits": decoding.seed} if decoding.temperature or decoding.order == "random" else {}
        return Cost.of(
            self.result.ledger,
            self.blanks,
            precision=self.precision,
            plan=decoding.plan,
            steps=self.result.num_steps,
            seeds={**self.seeds, **seeds},
        )

    @property
    def num_loops(self) -> int | None:
        """The loop count, where the plan is one."""
        first = self.decoding.plan.parts[0]
        return first.compute.num_loops if first.steps is None and first.compute.exit is None else None

    @property
    def share(self) -> float:
        """Share of the counted puzzles that are solved, NaN without any."""
        return float(self._solved.mean()) if len(self._solved) else math.nan

    @property
    def _solved(self) -> NDArray[np.bool_]:
        return self.result.solved if self.counted is None else self.result.solved[self.counted]

    @property
    def stderr(self) -> float:
        """Standard error of the share solved over puzzles, NaN for fewer than two."""
        count, share = len(self._solved), self.share
        return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def share_row(solved: dict[str, Any]) -> tuple[str, ...]:
    """A row of `SHARE_COLUMNS` from what `Solved.to_dict` returned."""
    share, error = solved["share_solved"], solved["stderr"]
    return (
        solved["order"].replace("_", " "),
        str(solved["num_loops"] or solved["plan"]),
        "-" if share is None else f"{100 * share:.1f} %",
        "-" if error is None or math.isnan(error) else f"{100 * error:.1f}",
        f"{solved['network_calls']:,}",
        f"{solved['loops']:,}",
        f"{solved['seconds']:.1f}",
    )


def held_out_puzzles(spec: SudokuSpec, num: int, threads: int = 1, clues: Clues | None = None) -> Puzzles:
    """Puzzles of the test split.

    clues: default 30 to 40 at 9x9, and as few as they can have (about 10) at 6x6.
    """
    if clues is None:
        clues = (30, 40) if spec == NINE else "minimal"
    return generate(spec, num, seed=HELD_OUT_SEED, clues=clues, split="test", threads=threads)


def given_puzzles(source: str, spec: SudokuSpec | None = None) -> PuzzleFile:
    """The puzzles of a file, of standard input ("-"), or of a board itself; spec: the size expected."""
    if source == "-":
        return parse_puzzles(_standard_input(), "standard input", spec)
    # os.path.exists: a board may be longer than a name can be
    if looks_like_board(source) and not os.path.exists(source):
        return parse_puzzles(source.splitlines(), "the board given", spec)
    note_waiting(Path(source))
    return read_puzzles(source, spec)


def _standard_input() -> Iterable[str]:
    if sys.stdin.isatty():
        note("type or paste puzzles, then Ctrl-D on a line of its own")
    data = getattr(sys.stdin, "buffer", None)  # a replacement of standard input may have text alone
    if data is None:
        return sys.stdin
    return io.StringIO(decode(data.read(), "standard input", "replace"), newline=None)


def not_counted(puzzles: PuzzleFile, solutions: NDArray[np.int32]) -> Iterator[str]:
    """What a reader of the shares must know: the lines of puzzles that are not in them."""
    for count, what in ((0, "no solution"), (SEVERAL, "several solutions")):
        lines = puzzles.lines[: len(solutions)][solutions == count]
        if len(lines):
            more = ", ..." if len(lines) > _LINES_NAMED else ""
            named = ", ".join(map(str, lines[:_LINES_NAMED])) + more
            has, line = ("puzzle has", "line") if len(lines) == 1 else ("puzzles have", "lines")
            yield f"{len(lines)} {has} {what}, not counted below: {line} {named}"


def blanks(clues: Cells, solutions: Cells) -> list[Batch]:
    """Solved boards to measure the likelihood of what was blank, from puzzles and solutions [N, cells]."""
    tokens, given = torch.from_numpy(solutions).long() - 1, torch.from_numpy(clues != 0)
    unsolved = ~given.all(dim=1)
    tokens, given = tokens[unsolved], given[unsolved]
    return [
        Batch(tokens[start : start + _BATCH], prompt_mask=given[start : start + _BATCH])
        for start in range(0, len(tokens), _BATCH)
    ]


def greedy(orders: Sequence[str], loops: Sequence[int | ComputePlan]) -> list[Decoding]:
    """The most probable digit, a cell a step, in every order and with every plan."""
    return [
        Decoding(order=order, plan=plan, temperature=0.0) for order in orders for plan in map(as_plan, loops)
    ]


def solve_all(
    model: LoopMDM,
    spec: SudokuSpec,
    puzzles: Cells,
    decodings: Sequence[Decoding],
    *,
    batch_size: int = 64,
    progress: bool = False,
    counted: NDArray[np.bool_] | None = None,
    last_first: SampleResult | None = None,
    seeds: Mapping[str, int] = MappingProxyType({}),
    first_id: int = 0,
) -> list[Solved]:
    """Solve the puzzles [N, cells] once in every way.

    counted: [N] puzzles that the shares are of, None for all; last_first: `first` of `solve_puzzles` for the
    last way; seeds: of what was drawn before, such as the puzzles; first_id: as in `solve_with`.
    """
    firsts = [None] * (len(decodings) - 1) + [last_first]
    return [
        Solved(
            decoding,
            solve_with(
                model,
                puzzles,
                spec,
                decoding,
                batch_size=batch_size,
                progress=progress,
                first=first,
                first_id=first_id,
            ),
            int((puzzles == 0).sum()),
            decoding.dtype or model.compute_dtype,
            counted,
            dict(seeds),  # a process sends them to another one
        )
        for decoding, first in zip(decodings, firsts, strict=True)
    ]
