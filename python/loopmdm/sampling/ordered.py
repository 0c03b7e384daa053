"""The run of every decoding order: ask the order what it needs, compute only that, write what it reveals."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm.sampling.network import Call, Prediction
from loopmdm.sampling.result import StepEvent
from loopmdm.sampling.run import Run, check_finite
from loopmdm_kernels.types import SampledRows


class OrderedRun(Run):
    """Reveals what the order chooses of the predictions it asks for."""

    def step(self, step: int) -> StepEvent | None:
        order, loops_before = self.order, self.loops.clone()
        again = order.remasked(step)
        candidates = order.candidates(step)
        sampled = self._predict(step, candidates)
        if sampled is None:
            revealed, tokens = candidates[:0], candidates[:0]
            confidence = torch.empty(0, dtype=torch.float32)
        else:
            chosen = order.choose(step, candidates, sampled)
            revealed, tokens = candidates[chosen], sampled.token[chosen]
            confidence = sampled.log_prob[chosen].exp()
        if again is not None:
            revealed = torch.cat((revealed, again))
            tokens = torch.cat((tokens, torch.full_like(again, self.network.config.mask_token_id)))
            confidence = torch.cat((confidence, confidence.new_zeros(again.numel())))
            by_place = revealed.argsort()
            revealed, tokens, confidence = revealed[by_place], tokens[by_place], confidence[by_place]
        return self.write(step, revealed, tokens, confidence, loops_before)

    def _predict(self, step: int, candidates: Tensor) -> SampledRows | None:
        """Predictions of the candidates [R], or None if there are none."""
        slots, batch = self.slots, len(self.tokens)
        sequence, position = slots.sequence[candidates], slots.position[candidates]
        if self.decoding.skip_unchanged:
            active = (sequence.bincount(minlength=batch) > 0).nonzero().squeeze(1)
        else:
            active = (self.order.steps > step).nonzero().squeeze(1)
        if not active.numel():
            return None
        ends = torch.zeros(batch, dtype=torch.int64)
        ends.scatter_reduce_(0, sequence, slots.blocks.end[slots.blocks.of_slot[candidates]], "amax")
        start = (ends - self.network.context).clamp_min(0)  # of what the network reads
        results: list[tuple[Tensor, SampledRows]] = []
        for call in self.calls(step, active, self._times(step), start):
            place = torch.full((batch,), -1)
            place[call.sequences] = torch.arange(call.sequences.numel())
            inside = (place[sequence] >= 0).nonzero().squeeze(1)
            rows = place[sequence[inside]] * call.tokens.shape[1] + position[inside] - start[sequence[inside]]
            names = (slots.sequence_id[candidates[inside]], torch.full_like(rows, step), position[inside])
            prediction = self.predict(call, rows, names, candidates[inside], start)
            if prediction.sampled is not None:
                check_finite(prediction.sampled.log_prob, step, sequence[inside], position[inside])
                results.append((inside, prediction.sampled))
        if len(results) < 2:
            return results[0][1] if results else None
        back = torch.cat([inside for inside, _ in results]).argsort()
        return SampledRows(
            *(torch.cat(fields)[back] for fields in zip(*(s for _, s in results), strict=True))
        )

    def predict(
        self, call: Call, rows: Tensor, names: tuple[Tensor, ...], slots: Tensor, start: Tensor
    ) -> Prediction:
        """One network call and the draws of its rows, which are of `slots` [R]; start: [B], as of `calls`."""
        prediction = self.network.predict(call, rows, names)
        self.account(call, prediction.spent, rows.numel())
        return prediction

    def _times(self, step: int) -> Tensor | None:
        """Diffusion times [B] before the step, where something depends on them."""
        by_time = self.order.timed and self.decoding.plan.reading == "step"
        return self.order.times(step) if by_time or self.network.needs_times else None
