"""Ancestral sampling: the reverse process of masked diffusion on T uniform steps, in its two-stage form."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm.sampling.orders.base import Scheduled, Slots
from loopmdm_kernels.reference.philox import REVEAL_STREAM, uniform53


class Ancestral(Scheduled):
    """Exact ancestral sampling on t_i = 1 - i/T, i = 0..T, with T = L by default.

    A step from t to s reveals each masked position with probability (t - s)/t, independently of the tokens,
    and draws revealed tokens from the prediction. On the uniform grid (t_i - t_{i+1})/t_i = 1/(T - i): step 0
    reveals with probability 1/T, and given that a position is still masked at step i, each of the T - i steps
    left is equally likely. That hazard is the one of a uniform law on {0, .., T - 1}, and it never looks at
    the tokens, so

        reveal_step = floor(u T),  u uniform, one per position

    drawn before the first step has the same joint law as T coin flips per position. Steps that reveal nothing
    in a sequence then need no network call: T (1 - (1 - 1/T)^n) calls in expectation for n masked positions.
    """

    def __init__(self, slots: Slots, steps: int | None, seed: int) -> None:
        num_steps = slots.length if steps is None else steps
        stream = torch.full_like(slots.position, REVEAL_STREAM)
        uniform = uniform53(seed, torch.zeros_like(stream), slots.position, stream, slots.sequence_id)
        super().__init__((uniform * num_steps).long(), num_steps)
        self._num_sequences = slots.counts.numel()

    def times(self, step: int) -> Tensor:
        return torch.full((self._num_sequences,), 1.0 - step / self.num_steps, dtype=torch.float64)
