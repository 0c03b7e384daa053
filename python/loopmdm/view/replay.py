"""The state of a sampling run, rebuilt from its events."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm.sampling import SampleResult, StepEvent
from loopmdm.sampling.canvas import PADDING


class Replay:
    """Canvases [B, L] after the events applied so far, and how each position came to hold its token.

    An event whose token is the mask token takes a position back: it was masked again. Negative tokens pad
    sequences that are shorter than L. All tensors are on the CPU.
    """

    def __init__(self, canvas: Tensor, mask_token_id: int) -> None:
        if canvas.ndim != 2 or not canvas.numel():
            raise ValueError(f"canvas must be [B, L] and not empty, got shape {tuple(canvas.shape)}")
        self.mask_token_id = mask_token_id
        self.tokens = canvas.detach().to("cpu", torch.int64, copy=True)
        self.given = self.tokens != mask_token_id
        self.confidence = torch.zeros(
            canvas.shape, dtype=torch.float32
        )  # of the token held, 0 where masked or given
        self.revealed_at = torch.full_like(self.tokens, -1)  # step, -1 where masked or given
        self.fresh = torch.zeros_like(self.given)  # changed by the last event
        self.step = -1  # of the last event
        self.last_loops: tuple[int, int] | None = None  # fewest and most of the last event's sequences
        self.loops = torch.zeros(len(canvas), dtype=torch.int64)  # [B] summed over the events
        self.network_calls = torch.zeros(len(canvas), dtype=torch.int64)  # [B] events it was computed in

    def apply(self, event: StepEvent) -> None:
        """Write one event into the canvases."""
        where = (event.sequence, event.positions)
        revealed = event.tokens != self.mask_token_id
        self.tokens[where] = event.tokens
        self.confidence[where] = event.confidence.float() * revealed
        self.revealed_at[where] = torch.where(revealed, event.step, -1)
        self.fresh.zero_()
        self.fresh[where] = True
        self.step = event.step
        spent = torch.zeros_like(self.loops)
        spent[event.sequence] = event.loops
        self.loops += spent
        self.network_calls += spent > 0
        if bool(spent.any()):
            self.last_loops = (int(spent[spent > 0].min()), int(spent.max()))

    def finish(self, result: SampleResult) -> None:
        """Take the counts of calls that changed nothing from the result, and cut sequences at their ends."""
        self.network_calls = result.network_calls.cpu()
        self.loops = result.loops.cpu()
        behind = torch.arange(self.tokens.shape[1]) >= result.lengths.cpu()[:, None]
        self.tokens[behind] = PADDING

    @property
    def masked(self) -> Tensor:
        """Boolean [B, L]: the positions that hold the mask token."""
        return self.tokens == self.mask_token_id
