"""Remasking (ReMDM, arXiv 2503.00307): revealed tokens are masked again at times, to undo errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from loopmdm.sampling.orders.base import Order
from loopmdm.sampling.orders.slots import Slots
from loopmdm_kernels.types import SampledRows
from loopmdm_kernels.values import meant, real

DEFAULT_ETA = {"cap": 0.008, "rescale": 0.05, "conf": 1.0, "loop": 0.02}
_FLIP = 1  # names the coin of a slot and step; word 0 names the reveal times


@dataclass(frozen=True)
class Remasking:
    """How likely a revealed token is masked again in a step from t to s, with alpha = 1 - t.

    With sigma_max = min(1, (1 - alpha_s) / alpha_t), the most that keeps the marginals of the process:

    - "cap": min(eta, sigma_max)
    - "rescale": eta sigma_max
    - "conf": eta_i sigma_max, eta_i the softmax of -p over the revealed positions of the sequence, p what the
      model gave the token when it was drawn; eta scales all of them
    - "loop": eta while alpha rests at alpha_on, for times between t_on and t_off; no remasking before (alpha
      rises from 0 to alpha_on) and after (from alpha_on to 1)

    eta: in [0, 1]; None: .008, .05, 1 and .02. Prompts and given tokens are never masked.
    """

    kind: str
    eta: float | None = None
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self) -> None:
        if self.kind not in DEFAULT_ETA:
            raise ValueError(
                f"unknown remasking {self.kind!r}, accepted are {', '.join(DEFAULT_ETA)}"
                f"{meant(self.kind, DEFAULT_ETA)}"
            )
        given = {"eta": DEFAULT_ETA[self.kind]} if self.eta is None else {}
        for name in ("eta", "t_on", "t_off", "alpha_on"):
            number = real(given.get(name, getattr(self, name)))
            object.__setattr__(self, name, getattr(self, name) if number is None else float(number))
        if not _is_number(self.eta) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta of the remasking must be in [0, 1], got {self.eta!r}")
        if not all(map(_is_number, (self.t_on, self.t_off))) or not 0 < self.t_off < self.t_on < 1:
            raise ValueError(
                "t_on and t_off of the remasking must be in 0 < t_off < t_on < 1,"
                f" got {self.t_on!r} and {self.t_off!r}"
            )
        if not _is_number(self.alpha_on) or not 0 < self.alpha_on < 1:
            raise ValueError(f"alpha_on of the remasking must be in (0, 1), got {self.alpha_on!r}")

    def alpha(self, t: float) -> float:
        """Expected share of revealed positions at time t."""
        if self.kind != "loop":
            return 1.0 - t
        if t > self.t_on:
            return (1.0 - t) * self.alpha_on / (1.0 - self.t_on)
        return max(self.alpha_on, 1.0 - t * (1.0 - self.alpha_on) / self.t_off)

    def sigma(self, t: float, s: float) -> float:
        """Probability that the step from t to s masks a token; for "conf", what eta_i is multiplied by."""
        eta, before, after = self.eta or 0.0, self.alpha(t), self.alpha(s)
        sigma_max = 1.0 if before <= 0 else min(1.0, (1.0 - after) / before)
        if self.kind == "cap":
            return min(eta, sigma_max)
        if self.kind == "loop":
            return min(eta, sigma_max) if self.t_off < t <= self.t_on else 0.0
        return eta * sigma_max


class Remasked(Order):
    """The reverse process of ReMDM on T uniform steps.

    In a step from t to s a token is masked with probability sigma, and a mask is revealed with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), where sigma = 0 for the masks of "conf". Which of this
    happens is drawn before the network runs; both see the state before the step.
    """

    def __init__(self, slots: Slots, steps: int | None, seed: int, remasking: Remasking) -> None:
        super().__init__(slots)
        self.steps = slots.lengths if steps is None else torch.full_like(slots.lengths, steps)
        self._seed = seed
        self._rule = remasking
        self._surprise = torch.full(
            slots.masked.shape, -math.inf, dtype=torch.float32
        )  # -p of the token at each revealed slot
        self._flips: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.float32))

    @property
    def finished(self) -> bool:
        return False  # what is revealed now may be masked again

    def times(self, step: int) -> Tensor:
        return self._each(lambda t, s: 1.0 - self._rule.alpha(t), step)

    def candidates(self, step: int) -> Tensor:
        reveal = self._each(self._reveal, step)[self.slots.sequence]
        return (self.slots.masked & (self._coins(step) < reveal)).nonzero().squeeze(1)

    def remasked(self, step: int) -> Tensor | None:
        likely = self._each(self._rule.sigma, step)[self.slots.sequence]
        if not bool(likely.any()):
            return None
        if self._rule.kind == "conf":
            likely = likely * self._softmax_by_sequence()
        again = (~self.slots.masked & (self._coins(step) < likely)).nonzero().squeeze(1)
        self._surprise[again] = -math.inf
        return again if again.numel() else None

    def choose(self, step: int, candidates: Tensor, sampled: SampledRows) -> Tensor:
        self._surprise[candidates] = -sampled.log_prob.float().exp()
        return super().choose(step, candidates, sampled)

    def _reveal(self, t: float, s: float) -> float:
        """Probability that the step from t to s reveals a mask."""
        if s == 0:
            return 1.0
        before, after = self._rule.alpha(t), self._rule.alpha(s)
        sigma = 0.0 if self._rule.kind == "conf" else self._rule.sigma(t, s)
        return (after - (1.0 - sigma) * before) / (1.0 - before)

    def _each(self, value: Callable[[float, float], float], step: int) -> Tensor:
        """value(t, s) of each sequence's step from t to s, float64 [B]; 0 where all its steps are taken."""
        of = {
            steps: value(1.0 - step / steps, 1.0 - (step + 1) / steps if step + 1 < steps else 0.0)
            if step < steps
            else 0.0
            for steps in set(self.steps.tolist())
        }
        return torch.tensor([of[steps] for steps in self.steps.tolist()], dtype=torch.float64)

    def _coins(self, step: int) -> Tensor:
        if self._flips[0] != step:
            self._flips = (step, self.slots.uniforms(self._seed, _FLIP, step))
        return self._flips[1]

    def _softmax_by_sequence(self) -> Tensor:
        slots = self.slots
        weight = self._surprise.double().exp()  # -p is in [-1, 0]: nothing to subtract first; masks give 0
        total = torch.zeros(slots.num_sequences, dtype=torch.float64).index_add_(0, slots.sequence, weight)
        return weight / total.clamp_min(torch.finfo(torch.float64).tiny)[slots.sequence]


def as_remasking(remask: str | Remasking | None) -> Remasking | None:
    """The rule meant by an argument; a name stands for the rule with its default eta."""
    if remask is None or isinstance(remask, Remasking):
        return remask
    if isinstance(remask, str):
        return Remasking(remask)
    raise TypeError(f"remask must be None, a name or a Remasking, got {type(remask).__name__}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and math.isfinite(value)
