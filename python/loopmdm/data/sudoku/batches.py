"""Training batches as a pure function of (seed, step, micro_step, rank), and a start for position tables."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loopmdm import _sudoku
from loopmdm.data.batches import Batch, BatchSource
from loopmdm.data.sudoku.boards import Cells, SudokuSpec
from loopmdm.data.sudoku.clues import Clues, as_clues
from loopmdm.data.sudoku.puzzles import as_seed, generate_cells


class SudokuData:
    """Endless training batches of the train split.

    clues as in `as_clues`. "full": fresh random full grids without a prompt. Else a pool of `pool_size`
    puzzles with one solution each, made here (seconds), from which each batch element draws one and takes a
    random image under relabelling, row, column, band and stack moves and (square boxes) transposition.
    """

    def __init__(
        self,
        spec: SudokuSpec,
        *,
        seed: int,
        clues: Clues | None = "full",
        pool_size: int = 100_000,
        batch_size: int = 128,
        threads: int = 1,
    ) -> None:
        wanted = as_clues(spec, clues)
        if not 1 <= pool_size < 2**31:
            raise ValueError(f"pool_size must be in 1..2^31-1, got {pool_size}")
        self.spec = spec
        self.seed = as_seed(seed)
        self.batch_size = batch_size
        self.threads = threads
        self._pool: tuple[Cells, Cells] | None = None
        if wanted != "full":
            solutions, given = generate_cells(
                spec, pool_size, seed=self.seed, clues=wanted, split="train", threads=threads
            )
            self._pool = given, solutions

    def batch(
        self, step: int, micro_step: int = 0, rank: int = 0, batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(tokens int64 [B, cells] in 0..n-1, prompt_mask bool [B, cells], True at the clues)."""
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        numbers = [as_seed(step, "step"), as_seed(micro_step, "micro_step"), as_seed(rank, "rank")]
        seed = _batch_seed(self.seed, *numbers)
        if self._pool is None:
            solutions, _ = generate_cells(
                self.spec, size, seed=seed, clues="full", split="train", threads=self.threads
            )
            prompt = np.zeros(solutions.shape, dtype=bool)
        else:
            given, solutions = _sudoku.augment(
                self.spec.box_rows, self.spec.box_cols, *self._pool, seed=seed, num=size, threads=self.threads
            )
            prompt = given != 0
        return torch.from_numpy(solutions).long() - 1, torch.from_numpy(prompt)

    def source(self, accumulation: int) -> BatchSource:
        """The batches as a trainer asks for them; no two of a run are alike, whatever it accumulates."""

        def batch(step: int, micro_step: int, rank: int, world_size: int, batch_size: int) -> Batch:
            tokens, prompt_mask = self.batch(step, micro_step, rank, batch_size)
            return Batch(tokens, prompt_mask=prompt_mask)

        return batch


def _batch_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """A 63-bit seed for one batch; SeedSequence's hash is fixed across numpy versions."""
    words = [
        part for number in (seed, step, micro_step, rank) for part in (number & 0xFFFFFFFF, number >> 32)
    ]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def grid_positions(spec: SudokuSpec, hidden_size: int, seed: int, *, scale: float = 0.02) -> Tensor:
    """A start for a learned position table, float32 [cells, hidden_size].

    Each cell gets the sum of a vector of its row, of its column and of its box, all normal with standard
    deviation scale / sqrt(3), so that entries have standard deviation `scale` and cells of one unit are
    close.
    """
    generator = torch.Generator().manual_seed(as_seed(seed))
    vectors = torch.randn(3, spec.size, hidden_size, generator=generator, dtype=torch.float32) * (
        scale / 3**0.5
    )
    rows, cols, boxes = (torch.from_numpy(of) for of in spec.units_of_cells())
    return vectors[0, rows] + vectors[1, cols] + vectors[2, boxes]
