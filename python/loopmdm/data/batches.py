"""One form for the batches of every data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences to train or evaluate on."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor | None = None  # [B, L], 1 or True = real token; None: all real
    prompt_mask: Tensor | None = None  # [B, L] bool, True = given, never masked, not counted; None: none

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; does not wait for copies from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch in pinned memory."""
        return self._map(Tensor.pin_memory)

    def rows(self, start: int, end: int) -> Batch:
        """Some of the sequences."""
        return self._map(lambda tensor: tensor[start:end])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        attention_mask, prompt_mask = self.attention_mask, self.prompt_mask
        return Batch(
            function(self.input_ids),
            None if attention_mask is None else function(attention_mask),
            None if prompt_mask is None else function(prompt_mask),
        )


# (step, micro_step, rank, world_size, batch_size) -> Batch. Pure, so that a resumed run sees the same data.
BatchSource: TypeAlias = Callable[[int, int, int, int, int], Batch]
