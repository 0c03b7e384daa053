"""Batches made one ahead of the step that reads them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch

from loopmdm.data.batches import Batch, BatchSource
from loopmdm.train.config import TrainConfig
from loopmdm.train.parallel import Layout


class Prefetcher:
    """Makes the next batch of one rank in a thread while the present one is trained on."""

    def __init__(
        self, source: BatchSource, config: TrainConfig, layout: Layout, device: torch.device
    ) -> None:
        self._source, self._config, self._layout, self._device = source, config, layout, device
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._position: tuple[int, int] | None = None
        self._future: Future[Batch] | None = None

    def get(self, step: int, index: int) -> Batch:
        """This rank's micro-batch `index` of a step, on the device."""
        if self._position != (step, index) or self._future is None:
            self._future = self._executor.submit(self._make, step, index)
        batch = self._future.result()
        carry, next_index = divmod(index + 1, self._layout.own)
        self._position, self._future = (step + carry, next_index), None
        if step + carry < self._config.steps:
            self._future = self._executor.submit(self._make, *self._position)
        return batch.to(self._device)

    def _make(self, step: int, index: int) -> Batch:
        batch = self._source(step, *self._layout.place(index), self._config.batch_size)
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
