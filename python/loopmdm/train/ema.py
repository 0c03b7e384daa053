"""Exponential moving average of the weights, with the warm-up of the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loopmdm.train.parallel import local


class EMA:
    """Averages the trainable parameters of a model, in fp32 and in the order of `named_parameters`.

    Update n (counted from 1) uses the decay min(decay, (1 + n) / (10 + n)):
    shadow -= (1 - decay_n) * (shadow - parameter). Of a parameter that is split over ranks, each averages its
    part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trainable]
        self.parameters: list[Tensor] = [p for _, p in trainable]
        self.shadow = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [local(p).float() for p in self.parameters]
        torch._foreach_lerp_([local(s) for s in self.shadow], parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model for the duration of a `with` block, then the weights back."""
        saved = [p.detach().clone() for p in self.parameters]
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(saved)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        # In place, so that caches keyed on a parameter's version notice.
        torch._foreach_copy_([local(p) for p in self.parameters], [local(value) for value in values])
