"""One form for the batches of every data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences to train or evaluate on."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor | None = None  # [B, L], 1 or True = real token; None: all real
    prompt_mask: Tensor | None = None  # [B, L] bool, True = given, never masked, not counted; None: none

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        attention_mask, prompt_mask = self.attention_mask, self.prompt_mask
        return Batch(
            self.input_ids.to(device),
            None if attention_mask is None else attention_mask.to(device),
            None if prompt_mask is None else prompt_mask.to(device),
        )


# (step, micro_step, rank, world_size, batch_size) -> Batch. Pure, so that a resumed run sees the same data.
BatchSource: TypeAlias = Callable[[int, int, int, int, int], Batch]


def batch_source(data: Any, accumulation: int = 1) -> BatchSource:
    """The batches of a `SudokuData`, a `TextData` or a function that already is a `BatchSource`.

    accumulation: micro-batches of an optimizer step, which a `TextData` has to agree with.
    """
    if callable(data):
        source: BatchSource = data
        return source
    from loopmdm.data.sudoku import SudokuData

    if isinstance(data, SudokuData):

        def sudoku(step: int, micro_step: int, rank: int, world_size: int, batch_size: int) -> Batch:
            tokens, prompt_mask = data.batch(step, micro_step, rank, batch_size)
            return Batch(tokens, prompt_mask=prompt_mask)

        return sudoku
    from loopmdm.data.packing import TextData

    if isinstance(data, TextData):
        if data.accumulation != accumulation:
            raise ValueError(
                f"data was made for accumulation {data.accumulation}, the run accumulates {accumulation}"
                " micro-batches: sequences would be skipped or repeated"
            )

        def text(step: int, micro_step: int, rank: int, world_size: int, batch_size: int) -> Batch:
            input_ids, attention_mask = data.batch(step, micro_step, rank, world_size, batch_size)
            return Batch(input_ids, attention_mask=attention_mask)

        return text
    raise TypeError(
        "data must be a SudokuData, a TextData or a function (step, micro_step, rank, world_size, batch_size)"
        f" -> Batch, got {type(data).__name__}"
    )
