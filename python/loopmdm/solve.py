"""Solving Sudoku puzzles: clues are fixed tokens, blanks are masks to fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from loopmdm.data.sudoku import SudokuSpec, is_valid_solution
from loopmdm.data.sudoku.boards import Cells, check_cells
from loopmdm.model.flops import SamplingLedger
from loopmdm.plan import ComputePlan, as_plan
from loopmdm.sampling import Decoding, SampleResult
from loopmdm.sampling.sampler import sample_with
from loopmdm_kernels.values import positive


@dataclass
class SolveResult:
    """One answer per puzzle, and what it cost."""

    boards: NDArray[np.uint8]  # [N, cells] digits 1..n
    valid: NDArray[np.bool_]  # [N] every row, column and box holds every digit once
    fits_clues: NDArray[np.bool_]  # [N] every clue is where it was
    loops: NDArray[np.int64]  # [N] loops summed over the network calls
    network_calls: NDArray[np.int64]  # [N]
    seconds: float
    ledger: SamplingLedger  # of all network calls
    num_steps: int  # denoising steps

    @classmethod
    def of_all(cls, parts: Sequence[SolveResult]) -> SolveResult:
        """The answers to the puzzles of several results, in order, and what they cost in all.

        They were computed at the same time, so that the slowest one says how long it took.
        """
        ledger = SamplingLedger(parts[0].ledger.length)
        for part in parts:
            ledger.add(part.ledger)
        return cls(
            boards=np.concatenate([part.boards for part in parts]),
            valid=np.concatenate([part.valid for part in parts]),
            fits_clues=np.concatenate([part.fits_clues for part in parts]),
            loops=np.concatenate([part.loops for part in parts]),
            network_calls=np.concatenate([part.network_calls for part in parts]),
            seconds=max(part.seconds for part in parts),
            ledger=ledger,
            num_steps=max(part.num_steps for part in parts),
        )

    @property
    def solved(self) -> NDArray[np.bool_]:
        """Whether each board is a solution of its puzzle, [N]. A puzzle with one solution has no other."""
        return self.valid & self.fits_clues

    @property
    def accuracy(self) -> float:
        """Share of the puzzles solved."""
        return float(self.solved.mean())


def solve_puzzles(
    model: Any,
    puzzles: ArrayLike,
    spec: SudokuSpec,
    *,
    num_loops: int | ComputePlan | None = None,
    order: str = "confidence",
    batch_size: int = 64,
    seed: int = 0,
    temperature: float = 0.0,
    steps: int | None = None,
    tokens_per_step: int | None = None,
    threshold: float | None = None,
    entropy_bound: float | None = None,
    progress: bool = False,
    first: SampleResult | None = None,
) -> SolveResult:
    """Fill in puzzles with a model trained on full boards.

    Args:
        model: a `LoopMDM` over the digits of `spec`, such as the shipped checkpoints.
        puzzles: integers [N, cells], 0 a blank.
        spec: the board.
        num_loops: loops at every step, a `ComputePlan`, or None for the model's max_loops.
        order: decoding order, as in `sample`.
        batch_size: puzzles solved at once; the answers do not depend on it.
        seed: of the token draws, where temperature > 0.
        temperature: 0 takes the most probable digit.
        steps: how many cells a step fills is said, as in `sample`, by one of these four at most; without any
            it is one cell a step ("ancestral": as many steps as cells).
        tokens_per_step: see `steps`.
        threshold: see `steps`.
        entropy_bound: see `steps`.
        progress: show a progress bar per batch when standard error is a terminal.
        first: what `sample` gave with these options for the first puzzles, which are then not solved again.

    Raises:
        ValueError, TypeError: on puzzles that are no boards of `spec`, a model of another vocabulary, and
            what `sample` rejects.
    """
    options = locals()
    pace = {name: options[name] for name in ("steps", "tokens_per_step", "threshold", "entropy_bound")}
    decoding = Decoding(order=order, plan=as_plan(num_loops), temperature=temperature, seed=seed, **pace)
    return solve_with(model, puzzles, spec, decoding, batch_size=batch_size, progress=progress, first=first)


def solve_with(
    model: Any,
    puzzles: ArrayLike,
    spec: SudokuSpec,
    decoding: Decoding,
    *,
    batch_size: int = 64,
    progress: bool = False,
    first: SampleResult | None = None,
    first_id: int = 0,
) -> SolveResult:
    """`solve_puzzles` with the options of decoding in one value.

    first_id: number of the first puzzle, which draws follow from, among those that others solve too.
    """
    cells = check_cells(spec, puzzles, "puzzles")
    if cells.ndim != 2 or not len(cells):
        raise ValueError(f"puzzles must be [N, {spec.cells}] with N >= 1, got shape {list(cells.shape)}")
    size = positive("batch_size", batch_size)
    config = model.config
    if (config.vocab_size, config.mask_token_id) != (spec.vocab_size, spec.mask_token_id):
        raise ValueError(
            f"the model has vocab_size {config.vocab_size} and mask_token_id {config.mask_token_id},"
            f" but {spec} boards need {spec.vocab_size} and {spec.mask_token_id}"
        )
    tokens = to_fill(spec, cells)
    results = [] if first is None else [first]
    for start in range(0 if first is None else len(first.tokens), len(cells), size):
        part = tokens[start : start + size]
        ids = list(range(first_id + start, first_id + start + len(part)))
        results.append(sample_with(model, decoding, infill=part, sequence_ids=ids, progress=progress))
    ledger = SamplingLedger(spec.cells)
    for result in results:
        ledger.add(result.ledger)
    boards = torch.cat([result.tokens for result in results]).cpu().numpy().astype(np.uint8) + np.uint8(1)
    return SolveResult(
        boards=boards,
        valid=is_valid_solution(spec, boards),
        fits_clues=((cells == 0) | (cells == boards)).all(axis=1),
        loops=torch.cat([result.loops for result in results]).cpu().numpy(),
        network_calls=torch.cat([result.network_calls for result in results]).cpu().numpy(),
        seconds=sum(result.seconds for result in results),
        ledger=ledger,
        num_steps=max(result.num_steps for result in results),
    )


def to_fill(spec: SudokuSpec, cells: Cells) -> Tensor:
    """Puzzles [N, cells], 0 a blank, as token ids, int64: the mask at every blank."""
    return torch.from_numpy(np.where(cells == 0, spec.mask_token_id, cells.astype(np.int64) - 1))
