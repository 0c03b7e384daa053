"""The reference's sampler with its arithmetic, for people who compare with published perplexities.

MDLM's `ddpm_cache` gives every masked position a race over the vocabulary and the mask in every step, with
fp32 uniforms of 24 bits. A time below 2^-24 cannot occur, so a token of probability p beats the mask in a
step from t to s less often than it should, by the factor

    f(r) = (1/r) / (exp(1/r) - 1),   r = 2^24 p (t - s) / s,

(competition among tokens neglected), which cuts off rare tokens: samples look better and vary less. The race
alone is reproduced; logits and softmax stay in fp32, where the reference's are bf16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loopmdm.model import vocabulary
from loopmdm.plan import StepCompute
from loopmdm.sampling.canvas import Canvas
from loopmdm.sampling.decoding import Decoding
from loopmdm.sampling.network import Network
from loopmdm.sampling.orders import Order
from loopmdm.sampling.result import StepEvent
from loopmdm.sampling.run import Run, check_finite
from loopmdm_kernels.philox import philox4x32

LAST_TIME = 1e-5  # the reference's eps
_GENERATOR_STREAM = 3 << 29  # in the step word, beside those of reveals and dropout
_ROWS = 64  # logits in memory at once


def race(probs: Tensor, mask_token_id: int, t: float, s: float, uniform: Tensor) -> Tensor:
    """Winner [n] among tokens of probability probs [n, V] and the mask, in a step from t to s."""
    chances = probs * (t - s)
    chances[:, mask_token_id] = s
    return (chances / (1e-10 - (uniform + 1e-10).log())).argmax(dim=-1)


class ReferenceRun(Run):
    """T steps from 1 to 1e-5, and one that gives whatever is left its most probable token.

    Each sequence has a T of its own. It is computed again only after one of its tokens has changed.
    """

    def __init__(self, canvas: Canvas, order: Order, network: Network, decoding: Decoding) -> None:
        super().__init__(canvas, order, network, decoding)
        self._steps: list[int] = order.steps.tolist()  # [B]
        self._hidden: dict[int, tuple[StepCompute, Tensor, Tensor | None]] = {}

    @property
    def num_steps(self) -> int:
        return self.order.num_steps + 1

    @torch.inference_mode()
    def step(self, step: int) -> StepEvent | None:
        slots, loops_before = self.slots, self.loops.clone()
        open_slots = slots.open()
        active = sorted(set(slots.sequence[open_slots].tolist()))
        if not active:
            return None
        self._update_hidden(step, torch.tensor(active))
        events = []
        for row in active:
            mine = open_slots[slots.sequence[open_slots] == row]
            tokens, confidence = self._race(step, row, mine)
            check_finite(confidence, step, slots.sequence[mine], slots.position[mine])
            changed = tokens != self.network.config.mask_token_id
            if bool(changed.any()):
                del self._hidden[row]
            events.append((mine[changed], tokens[changed], confidence[changed]))
        revealed, tokens, confidence = (torch.cat(parts) for parts in zip(*events, strict=True))
        return self.write(step, revealed, tokens, confidence, loops_before)

    def _time(self, step: int, row: int) -> float:
        return 1.0 - step * (1.0 - LAST_TIME) / self._steps[row]

    def _update_hidden(self, step: int, active: Tensor) -> None:
        """Run the network on the active sequences that have changed."""
        planned = min(step, self.order.num_steps - 1)  # a plan with steps has those of every sequence
        # A sequence with fewer steps has nothing open behind them.
        own = [self._time(min(step, steps), row) for row, steps in enumerate(self._steps)]
        times = torch.tensor(own, dtype=torch.float64)
        stale = torch.zeros_like(active, dtype=torch.bool)
        for compute, numbers, loops in self.computes(planned, active, times):
            for number, most in zip(numbers.tolist(), _each(loops, numbers), strict=True):
                known = self._hidden.get(int(active[number]))
                stale[number] = known is None or known[0] != compute._replace(num_loops=most)
        if self.network.needs_times or not self.decoding.skip_unchanged:
            stale.fill_(True)
        for call in self.calls(planned, active[stale], times):
            hidden, spent, sigma = self.network.hidden(call)
            for place, (row, most) in enumerate(
                zip(call.sequences.tolist(), call.limits.tolist(), strict=True)
            ):
                noise = None if sigma is None else sigma[place : place + 1]
                compute = call.compute._replace(num_loops=most)
                self._hidden[row] = (compute, hidden[place].clone(), noise)
            self.account(call, spent, 0)

    def _race(self, step: int, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Token [n], the mask where it wins, of slots [n] of a sequence, and the token's probability."""
        compute, hidden, sigma = self._hidden[row]
        model = self.network.model_of(compute)
        head = self.network.head(model, sigma)
        t, s = self._time(step, row), self._time(step + 1, row)
        generator = self._generator(step, self.slots.sequence_id[slots[:1]])
        tokens, confidence = [], []
        for part in torch.split(self.slots.position[slots], _ROWS):
            logits = vocabulary.head_logits(
                hidden[None, part.to(hidden.device)], head, compute_dtype=model.compute_dtype
            )
            logits = logits[0].float()
            logits[:, model.config.mask_token_id] = -math.inf
            probs = torch.softmax(logits, dim=-1)
            if step == self._steps[row]:
                token = probs.argmax(dim=-1)
            else:
                uniform = torch.rand(probs.shape, generator=generator, dtype=torch.float32).to(probs.device)
                token = race(probs, model.config.mask_token_id, t, s, uniform)
            tokens.append(token.cpu())
            confidence.append(probs.gather(1, token[:, None]).squeeze(1).cpu())
        self.ledger.record_rows(model.config, slots.numel())
        return torch.cat(tokens), torch.cat(confidence)

    def _generator(self, step: int, sequence_id: Tensor) -> torch.Generator:
        """torch's uniforms, named by (seed, sequence id [1], step)."""
        words = philox4x32(self.decoding.seed, torch.tensor([step]), 0, _GENERATOR_STREAM, sequence_id)
        return torch.Generator().manual_seed((int(words[0]) << 31) ^ int(words[1]))


def _each(loops: int | Tensor, sequences: Tensor) -> list[int]:
    """Loops of every one of the sequences [n]."""
    counts: list[int] = loops.tolist() if isinstance(loops, Tensor) else [loops] * len(sequences)
    return counts
