"""Ancestral sampling: the reverse process of masked diffusion on T uniform steps, in its two-stage form."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm.sampling.orders.base import Scheduled
from loopmdm.sampling.orders.pace import Pace, Spread
from loopmdm.sampling.orders.slots import Slots


class Ancestral(Scheduled):
    """Exact ancestral sampling on t_i = 1 - i/T, i = 0..T, with T = its length for each sequence by default.

    A step from t to s reveals each masked position with probability (t - s)/t, independently of the tokens,
    and draws revealed tokens from the prediction. On the uniform grid (t_i - t_{i+1})/t_i = 1/(T - i): step 0
    reveals with probability 1/T, and given that a position is still masked at step i, each of the T - i steps
    left is equally likely. That hazard is the one of a uniform law on {0, .., T - 1}, and it never looks at
    the tokens, so

        reveal_step = floor(u T),  u uniform, one per position

    drawn before the first step has the same joint law as T coin flips per position. Steps that reveal nothing
    in a sequence then need no network call: T (1 - (1 - 1/T)^n) calls in expectation for n masked positions.

    With blocks, each is sampled so on its share of the steps, given the blocks before it.
    """

    exact = True

    def __init__(self, slots: Slots, steps: int | None, seed: int) -> None:
        each = slots.lengths if steps is None else torch.full_like(slots.lengths, steps)
        self._spread = Spread(slots.blocks, Pace(steps=steps), each)
        block = slots.blocks.of_slot
        inside = (slots.uniforms(seed) * self._spread.steps[block]).long()
        super().__init__(slots, self._spread.start[block] + inside, each)

    def times(self, step: int) -> Tensor:
        blocks = self.slots.blocks
        if not blocks.sizes.numel():
            return torch.zeros(self.slots.num_sequences, dtype=torch.float64)
        own = (self.steps - 1).clamp_max(step)  # of sequences that are done, their last
        current = ((own + 1) * blocks.count - 1) // self.steps  # [B] block within the sequence
        block = (blocks.first + current.clamp_min(0)).clamp_max(blocks.sizes.numel() - 1)
        done = (own - self._spread.start[block]).double() / self._spread.steps[block]
        revealed = blocks.before[block] + blocks.sizes[block] * done
        return 1.0 - revealed / self.slots.counts.clamp_min(1)


class FirstHitting(Scheduled):
    """Exact sampling in continuous time: one network call a position, each sequence at its own times.

    With n masked positions at time t the next reveal happens at t u^{1/n}, at a position chosen uniformly
    (first-hitting sampler, arXiv 2409.02908). Those are the order statistics of n independent uniform times,
    so the positions draw their times 1 - u beforehand, from the uniforms that `Ancestral` multiplies by T: it
    is that sampler for T without bound.

    tokens_per_step = k > 1 predicts k positions at the time of the first. That is faster, and not exact.
    """

    timed = True

    def __init__(self, slots: Slots, tokens_per_step: int | None, seed: int) -> None:
        self.exact = tokens_per_step in (None, 1)
        blocks = slots.blocks
        spread = Spread(blocks, Pace(tokens_per_step=tokens_per_step))
        uniforms, block = slots.uniforms(seed), blocks.of_slot
        super().__init__(slots, spread.step_of(blocks.rank(uniforms), block), spread.each)
        counts = slots.counts[slots.sequence]
        self._times = (counts - blocks.before[block] - blocks.sizes[block] * uniforms) / counts

    def times(self, step: int) -> Tensor:
        due = self.schedule.at(step)
        times = torch.zeros(self.slots.num_sequences, dtype=torch.float64)
        return times.scatter_reduce_(0, self.slots.sequence[due], self._times[due], "amax")
