"""Losses that are no numbers or jump: a warning, and the micro-batches of the step in a file."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from loopmdm.formats import safetensors_files
from loopmdm.train.step import MicroBatch
from loopmdm_kernels.files import write_files

FOLDER = "spikes"  # in that of the run
_WINDOW = 100  # steps whose median is what is usual
_FEWEST = 20  # steps before anything is called unusual
_MOST_FILES = 8  # of spikes, of one process; a run that jumps all the time is not saved all the time


class Watch:
    """Compares every loss with those before it.

    factor: of the median of the last 100 losses, beyond which a loss is a spike; 0: none is.
    """

    def __init__(self, folder: Path, rank: int, factor: float) -> None:
        self._folder, self._rank, self._factor = folder / FOLDER, rank, factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._saved = 0

    def look(self, step: int, loss: float, micro_batches: Sequence[MicroBatch]) -> str | None:
        """A warning if the loss of a step is a spike; the same on every rank."""
        before = list(self._losses)
        self._losses.append(loss)
        if not self._factor or len(before) < _FEWEST:
            return None
        usual = statistics.median(before)
        if loss <= self._factor * usual:
            return None
        saved = f"its batch is not saved, there are {_MOST_FILES} in {self._folder}"
        if self._saved < _MOST_FILES:
            self._saved += 1
            saved = self.save(step, loss, micro_batches)
        return (
            f"step {step}: the loss is {loss:.4g}, {loss / usual:.1f} times the median of the last"
            f" {len(before)} steps; {saved}"
        )

    def save(self, step: int, loss: float, micro_batches: Sequence[MicroBatch]) -> str:
        """Write what this rank computed a loss from; returns where it is."""
        tensors = {
            f"{name}.{number}": value.cpu()
            for number, one in enumerate(micro_batches)
            for name, value in one.batch._asdict().items()
            if value is not None
        }
        used = [{"num_loops": one.num_loops, "seed": one.seed} for one in micro_batches]
        header = {"step": step, "loss": loss if math.isfinite(loss) else str(loss), "micro_batches": used}
        path = self._folder / f"step-{step:08d}-rank-{self._rank}.safetensors"
        text = {"loopmdm_micro_batches": json.dumps(header)}
        write_files({path: lambda temporary: safetensors_files.write(temporary, tensors, text)})
        return f"its batch is in {self._folder}"
