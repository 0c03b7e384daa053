"""Losses of light and heavy schedules without sampling: each state under the network its step would run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopmdm.quality.bootstrap import Floats
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.kit.sources import Denoiser, HeldOut
from loopmdm.study.kit.traces import Trace, bins_of, record_trace
from loopmdm.study.schedules.segments import Schedule, borders


class Proxy:
    """Losses of schedules from the states of held-out sequences as the light and the heavy network see them.

    Text: the NELBO of each sequence. Sudoku: 1 unless every digit on the way to the solution is the most
    probable one, which is what left-to-right decoding makes of the puzzle.
    """

    def __init__(self, light: tuple[Trace, int], heavy: tuple[Trace, int], steps: int) -> None:
        """light, heavy: the trace of a network and its loop count; both of the same states. steps: T."""
        if not np.array_equal(light[0].share, heavy[0].share, equal_nan=True):
            raise ValueError("light, heavy: their traces are of different states")
        self._trace = heavy[0]
        self._networks = (heavy, light)
        self.boards = not np.isnan(self._trace.right).all()
        self._steps = steps
        if self.boards:  # the step at which the sampler fills the r-th of n blanks
            rank, blanks = np.arange(self._trace.share.shape[1]), self._trace.there.sum(1)
            self._step = ((rank + 1) * steps - 1) // blanks[:, None]
        else:
            self._step = bins_of(self._trace, steps)

    @classmethod
    def of(
        cls,
        folder: StudyFolder,
        light: Denoiser,
        heavy: Denoiser,
        data: HeldOut,
        steps: int,
        *,
        num_t: int,
        seed: int,
    ) -> Proxy:
        """Of the sequences of `data`; what an earlier run finished is read from the folder."""
        if light.model is heavy.model:
            most = max(light.num_loops, heavy.num_loops)
            trace = record_trace(folder, heavy.model, data, most, num_t=num_t, seed=seed)
            return cls((trace, light.num_loops), (trace, heavy.num_loops), steps)
        light_trace, heavy_trace = (
            record_trace(folder, one.model, data, one.num_loops, num_t=num_t, seed=seed, name=one.name)
            for one in (light, heavy)
        )
        return cls((light_trace, light.num_loops), (heavy_trace, heavy.num_loops), steps)

    @property
    def measure(self) -> str:
        return "share of boards not solved (proxy)" if self.boards else "NELBO (nats per token)"

    def losses(self, schedules: Sequence[Schedule]) -> Floats:
        """The loss of each sequence under each schedule, [N, M]; all schedules have as many segments."""
        light = np.asarray(schedules, dtype=float)
        parts = [self._by_segment(trace, loops, light.shape[1]) for trace, loops in self._networks]
        heavy_part, light_part = parts
        total: Floats = heavy_part.sum(1)[:, None] + (light_part - heavy_part) @ light.T
        # Of boards these are numbers of wrong digits, and the first one is fatal.
        return np.minimum(np.rint(total), 1.0) if self.boards else total

    def _by_segment(self, trace: Trace, loops: int, segments: int) -> Floats:
        """Summed over the states of each segment, [N, segments]: the NELBO's part, or wrong digits."""
        there = trace.there
        segment = np.searchsorted(borders(segments, self._steps), self._step[there], side="right") - 1
        values = 1.0 - trace.right[:, :, loops - 1] if self.boards else trace.loss[:, :, loops - 1]
        sums = np.zeros((len(there), segments))
        sequence = np.broadcast_to(np.arange(len(there))[:, None], there.shape)
        np.add.at(sums, (sequence[there], segment), values[there])
        return sums
