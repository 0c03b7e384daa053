"""The law of the loop count S in training: one draw per optimizer step, shared by the whole global batch.

`LoopLaw.sample(seed, step)` is a pure function, so every rank and every accumulation micro-batch of a step
gets the same S, and a resumed run continues the same sequence. The laws:

    uniform      S ~ U{1..max_loops} (LoopMDM)
    fixed:S      always S
    poisson[:r]  tau ~ N(log r - s^2 / 2, s), s = 1/2, S ~ Poisson(e^tau) + 1 (Huginn, arXiv 2502.05171),
                 conditioned on S <= max_loops, which bounds a step's memory; default r = (max_loops + 1) / 2
    flops        p(S) proportional to 1 / F(S), F(S) the FLOPs of a step, S <= max_loops: every depth gets the
                 same compute
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loopmdm.model.flops import Convention, Dimensions, forward_flops
from loopmdm_kernels.values import integer, positive

POISSON_SIGMA = 0.5
MAX_LOOPS = 1024  # far beyond what helps any model: more is a slip of the pen, and would run for hours
_STREAM = 0x4C4F4F50  # "LOOP": keeps these draws apart from every other use of the same seed


@dataclass(frozen=True)
class LoopLaw:
    """A distribution over loop counts: `probabilities[s - 1]` belongs to S = s; `spec` names the law."""

    spec: str
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        weights = self.probabilities
        if not weights or min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-9):
            raise ValueError(
                f"probabilities of law {self.spec!r} must be non-negative and sum to 1, got {weights}"
            )

    @classmethod
    def parse(
        cls,
        spec: str,
        max_loops: int,
        *,
        dims: Dimensions | None = None,
        length: int | None = None,
        convention: Convention = "blocks+head+embedding",
    ) -> LoopLaw:
        """Build a law from its name: "uniform", "fixed:S", "poisson", "poisson:r" or "flops".

        "flops" needs `dims` (a `LoopMDMConfig`) and the sequence `length`; `convention` what F(S) counts.
        """
        if not isinstance(spec, str):
            raise TypeError(f"loop law is a {type(spec).__name__}; accepted: a string, {_ACCEPTED}")
        name, _, argument = spec.partition(":")
        if name == "uniform" and not argument:
            return cls.uniform(max_loops)
        if name == "fixed":
            loops = loop_count(f"S of the loop law {spec!r}", int(_number(spec, argument, int)))
            return cls.fixed(loops)
        if name == "poisson":
            return cls.poisson(max_loops, _number(spec, argument, float) if argument else None)
        if name == "flops" and not argument:
            if dims is None or length is None:
                raise ValueError("loop law 'flops' needs dims and length: the cost of a step depends on both")
            return cls.flops(max_loops, dims, length, convention)
        raise ValueError(f"loop law is {spec!r}; accepted: {_ACCEPTED}")

    @classmethod
    def uniform(cls, max_loops: int) -> LoopLaw:
        """U{1..max_loops}."""
        max_loops = loop_count("max_loops", max_loops)
        return cls("uniform", (1 / max_loops,) * max_loops)

    @classmethod
    def fixed(cls, num_loops: int) -> LoopLaw:
        """Always `num_loops`."""
        num_loops = loop_count("num_loops", num_loops)
        return cls(f"fixed:{num_loops}", (0.0,) * (num_loops - 1) + (1.0,))

    @classmethod
    def poisson(cls, max_loops: int, rbar: float | None = None) -> LoopLaw:
        """Huginn's log-normal Poisson law given S <= max_loops (E[S] without this bound: rbar + 1)."""
        max_loops = loop_count("max_loops", max_loops)
        rbar = (max_loops + 1) / 2 if rbar is None else float(rbar)
        if not 0 < rbar < math.inf:
            raise ValueError(f"rbar of the poisson law is {rbar}; accepted: a positive number")
        normal = np.linspace(
            -8, 8, 2001
        )  # trapezoidal rule over tau, accurate to rounding for rates up to about 1e4
        log_rate = math.log(rbar) - POISSON_SIGMA**2 / 2 + POISSON_SIGMA * normal
        log_factorial = np.array([math.lgamma(s) for s in range(1, max_loops + 1)])
        extra_loops = np.arange(max_loops)
        log_mass = extra_loops[:, None] * log_rate - np.exp(log_rate) - log_factorial[:, None]
        return cls(f"poisson:{rbar!r}", _normalised(np.exp(log_mass) @ np.exp(-(normal**2) / 2)))

    @classmethod
    def flops(cls, max_loops: int, dims: Dimensions, length: int, convention: Convention) -> LoopLaw:
        """p(S) proportional to 1 / F(S) for S = 1..max_loops."""
        max_loops = loop_count("max_loops", max_loops)
        cost = [forward_flops(dims, length, s, convention) for s in range(1, max_loops + 1)]
        return cls("flops", _normalised(1 / np.array(cost)))

    @property
    def mean(self) -> float:
        """E[S]."""
        return sum(s * p for s, p in enumerate(self.probabilities, start=1))

    @property
    def largest(self) -> int:
        """The largest S the law can draw."""
        return len(self.probabilities)

    def sample(self, seed: int, step: int) -> int:
        """S of optimizer step `step`: a pure function of (seed, step), the same in every process."""
        for name, value in (("seed", seed), ("step", step)):
            number = integer(name, value)
            if not 0 <= number < 2**64:
                raise ValueError(f"{name} is {number}; accepted: 0 to 2**64 - 1")
        bits = np.random.Philox(
            key=np.array([seed, _STREAM], dtype=np.uint64), counter=np.array([0, step, 0, 0], dtype=np.uint64)
        ).random_raw()
        uniform = (int(bits) >> 11) * 2.0**-53
        return min(int(np.searchsorted(self._cumulative, uniform, side="right")) + 1, self.largest)

    @cached_property
    def _cumulative(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.cumsum(np.array(self.probabilities))


_ACCEPTED = "'uniform', 'fixed:S', 'poisson', 'poisson:r' or 'flops'"


def _normalised(weights: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, ...]:
    return tuple((weights / weights.sum()).tolist())


def _number(spec: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"loop law {spec!r}: {text!r} is not a number; accepted: {_ACCEPTED}") from None


def loop_count(name: str, value: Any) -> int:
    """A whole number in 1..MAX_LOOPS, or an error that names it."""
    loops = positive(name, value)
    if loops > MAX_LOOPS:
        raise ValueError(f"{name} must be in 1..{MAX_LOOPS}, got {loops}")
    return loops
