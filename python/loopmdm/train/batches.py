"""Batches made one ahead of the step that reads them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch

from loopmdm.data.batches import Batch, BatchSource
from loopmdm.train.config import TrainConfig


class Prefetcher:
    """Makes the next batch of one rank in a thread while the present one is trained on."""

    def __init__(
        self, source: BatchSource, config: TrainConfig, rank: int, world_size: int, device: torch.device
    ) -> None:
        self._source, self._config, self._device = source, config, device
        self._rank, self._world_size = rank, world_size
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._position: tuple[int, int] | None = None
        self._future: Future[Batch] | None = None

    def get(self, step: int, micro_step: int) -> Batch:
        """A batch on the device."""
        if self._position != (step, micro_step) or self._future is None:
            self._future = self._executor.submit(self._make, step, micro_step)
        batch = self._future.result()
        carry, next_micro_step = divmod(micro_step + 1, self._config.accumulation)
        self._position, self._future = (step + carry, next_micro_step), None
        if step + carry < self._config.steps:
            self._future = self._executor.submit(self._make, *self._position)
        return batch.to(self._device)

    def _make(self, step: int, micro_step: int) -> Batch:
        batch = self._source(step, micro_step, self._rank, self._world_size, self._config.batch_size)
        return batch.pinned() if self._device.type == "cuda" else batch

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(cancel_futures=True)


def batch_source(data: Any, accumulation: int = 1) -> BatchSource:
    """The batches of a `SudokuData`, a `TextData` or a function that already is a `BatchSource`.

    accumulation: micro-batches of an optimizer step, which a `TextData` has to agree with.
    """
    if callable(data):
        source: BatchSource = data
        return source
    if hasattr(data, "source"):
        return cast(BatchSource, data.source(accumulation))
    raise TypeError(
        "data must be a SudokuData, a TextData or a function (step, micro_step, rank, world_size, batch_size)"
        f" -> Batch, got {type(data).__name__}"
    )
