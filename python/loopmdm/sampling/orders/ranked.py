"""Orders that predict every masked position in reach and reveal the best rated ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loopmdm.sampling.orders.base import Order
from loopmdm.sampling.orders.pace import Pace, Schedule, Spread
from loopmdm.sampling.orders.slots import Slots
from loopmdm_kernels.types import RevealRule, SampledRows

Rating = Callable[[SampledRows], Tensor]


def confidence(sampled: SampledRows) -> Tensor:
    """Probability of the most probable token."""
    return sampled.top1_prob


def margin(sampled: SampledRows) -> Tensor:
    """Lead of the most probable token over the second."""
    return sampled.top1_prob - sampled.top2_prob


def negative_entropy(sampled: SampledRows) -> Tensor:
    """The surest prediction first."""
    return -sampled.entropy


_NAMES: dict[Rating, str] = {confidence: "confidence", margin: "margin", negative_entropy: "certainty"}


class Ranked(Order):
    """Reveals the best rated open positions of each sequence, the lowest position on ties.

    In reach are the current block, and of a window of w positions the w leftmost open ones. How many are
    revealed is fixed, or decided by the predictions: the leading run, in the order of the ratings, of
    positions whose score reaches the threshold; or, with an entropy bound, the longest lead whose entropies H
    satisfy sum H - max H <= bound, which bounds what drawing them independently gives away. At least one.
    """

    def __init__(
        self, slots: Slots, pace: Pace, rating: Rating | Tensor, *, score: Rating = confidence
    ) -> None:
        """rating: of predictions, or one number a slot [N], the lowest first. score: for the threshold."""
        super().__init__(slots)
        self._pace = pace
        self._rating = rating
        self._score = score
        self._schedule: Schedule | None = None
        self.timed = pace.adaptive
        if pace.adaptive:
            self.steps = slots.counts
            return
        window = pace.window
        if window is not None and pace.tokens_per_step is not None:
            pace = pace._replace(tokens_per_step=min(window, pace.tokens_per_step))
        spread = Spread(slots.blocks, pace)
        reveal_step = spread.step_of(slots.blocks.rank(), slots.blocks.of_slot)
        self.steps = spread.each
        self._schedule = Schedule(reveal_step, self.num_steps)  # of numbers: which slots is decided later
        if window is not None and pace.steps is not None:
            most = int((-(-slots.counts // pace.steps)).max())
            if most > window:
                raise ValueError(
                    f"window is {window}, but with steps={pace.steps} a step reveals up to {most} positions"
                )

    @property
    def rule(self) -> RevealRule | None:
        place = self._rating.double() if isinstance(self._rating, Tensor) else None
        rating = "place" if isinstance(self._rating, Tensor) else _NAMES.get(self._rating)
        score = _NAMES.get(self._score)
        if rating is None or score is None:
            return None
        pace, schedule = self._pace, self._schedule
        by_step = None if schedule is None else (schedule.by_step, schedule.ends)
        return RevealRule(by_step, rating, score, place, pace.threshold, pace.entropy_bound, pace.window)

    def candidates(self, step: int) -> Tensor:
        slots = self.slots
        reach = slots.open()
        sequence = slots.sequence[reach]
        place = _places(sequence)
        block = slots.blocks.of_slot[reach]
        current = torch.full((slots.num_sequences,), -1)
        current[sequence[place == 0]] = block[place == 0]
        inside = block == current[sequence]
        if self._pace.window is not None:
            inside &= place < self._pace.window
        if self._schedule is not None:
            inside &= self._due(step)[sequence] > 0
        reach = reach[inside]
        if self._schedule is not None and isinstance(self._rating, Tensor):
            return reach[self._best(step, reach, -self._rating[reach])]  # known without a prediction
        return reach

    def choose(self, step: int, candidates: Tensor, sampled: SampledRows) -> Tensor:
        if isinstance(self._rating, Tensor):
            if self._schedule is not None:
                return torch.ones_like(candidates, dtype=torch.bool)
            rating = -self._rating[candidates]
        else:
            rating = self._rating(sampled)
        if self._schedule is not None:
            return self._best(step, candidates, rating)
        order, place, group = self._sorted(candidates, rating)
        if self._pace.threshold is not None:
            passed = self._score(sampled)[order] >= self._pace.threshold
        else:
            entropy = _table(sampled.entropy[order].double(), place, group)
            error = entropy.cumsum(dim=1) - entropy.cummax(dim=1).values
            bound = self._pace.entropy_bound
            assert bound is not None
            passed = error[group, place] <= bound
        failures = _table((~passed).long(), place, group).cumsum(dim=1)
        chosen = torch.empty_like(candidates, dtype=torch.bool)
        chosen[order] = (failures[group, place] == 0) | (place == 0)
        return chosen

    def _due(self, step: int) -> Tensor:
        """Slots that each sequence reveals in the step, [B]."""
        assert self._schedule is not None
        due = self.slots.sequence[self._schedule.at(step)]
        return due.bincount(minlength=self.slots.num_sequences)

    def _best(self, step: int, candidates: Tensor, rating: Tensor) -> Tensor:
        """Boolean [R]: as many of the best rated as the step reveals."""
        order, place, _ = self._sorted(candidates, rating)
        chosen = torch.empty_like(candidates, dtype=torch.bool)
        chosen[order] = place < self._due(step)[self.slots.sequence[candidates[order]]]
        return chosen

    def _sorted(self, candidates: Tensor, rating: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates by sequence, then best first: order, place in the sequence, number of the sequence."""
        order = rating.argsort(descending=True, stable=True)
        order = order[self.slots.sequence[candidates[order]].argsort(stable=True)]
        sequence = self.slots.sequence[candidates[order]]
        place = _places(sequence)
        return order, place, (place == 0).cumsum(0) - 1


def _places(group: Tensor) -> Tensor:
    """Place of each entry within its run of equal values: [R]."""
    index = torch.arange(group.numel())
    new = torch.ones_like(group, dtype=torch.bool)
    new[1:] = group[1:] != group[:-1]
    return index - torch.where(new, index, 0).cummax(0).values if group.numel() else index


def _table(values: Tensor, place: Tensor, group: Tensor) -> Tensor:
    """Values [R] as a table [groups, places], zero where there are none."""
    table = values.new_zeros(int(group.max()) + 1 if group.numel() else 0, int(place.max()) + 1)
    table[group, place] = values
    return table
