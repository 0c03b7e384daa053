"""`Decoding`: everything that decides how tokens are drawn, as one value that checks itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopmdm.plan import ComputePlan, as_plan
from loopmdm.sampling.orders import COUNTS, ORDERS, Pace
from loopmdm.sampling.remasking import Remasking, as_remasking
from loopmdm_kernels.ops import checks
from loopmdm_kernels.values import meant, real, whole

MAX_STEPS = 2**30 - 1  # the step is one word of the random number's name
_COUNTS = ("steps", "tokens_per_step", "block_length", "window", "max_batch", "min_new_tokens")
_PACES = ("steps", "tokens_per_step", "threshold", "entropy_bound")
_GRAPHS = "options of a row's logits or of each sequence"
_REFERENCE = "reference_numerics: the reference's sampler has none"
_OF_SEQUENCES = ("temperature", "top_p", "top_k", "min_p")  # each may be one value, or one a sequence
_SHAPES = ("min_p", "logits_processor", "cfg_scale", "min_new_tokens")  # of a row's logits
_NOT_THE_REFERENCES = ("remask", "block_length", "temperature", "top_p", "top_k", "cuda_graphs", *_SHAPES)


@dataclass(frozen=True)
class Decoding:
    """How masks become tokens: arguments of `sample` by the same names, which explains them.

    Whatever `sample` accepts is accepted and made plain: a number of any type is one of Python's, `plan` a
    `ComputePlan`, `remask` a `Remasking`, `forbidden` ids in ascending order.

    Raises:
        ValueError, TypeError: a value is out of range, or does not go with another.
    """

    steps: int | None = None
    order: str = "ancestral"
    plan: ComputePlan = field(default_factory=lambda: as_plan(None))
    temperature: float | tuple[float, ...] = 1.0  # a tuple: of each sequence, here and below
    top_p: float | tuple[float, ...] = 1.0
    seed: int = 0
    tokens_per_step: int | None = None
    threshold: float | None = None
    entropy_bound: float | None = None
    counts: str = "even"
    block_length: int | None = None
    window: int | None = None
    remask: Remasking | None = None
    top_k: int | tuple[int, ...] | None = None
    min_p: float | tuple[float, ...] = 0.0
    forbidden: tuple[int, ...] = ()
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    cfg_scale: float = 0.0
    eos_token_id: int | None = None
    min_new_tokens: int | None = None
    reference_numerics: bool = False
    max_batch: int | None = None
    skip_unchanged: bool = True
    dtype: torch.dtype | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        plain = {
            **{name: _count(name, getattr(self, name)) for name in _COUNTS},
            "threshold": _bound("threshold", self.threshold),
            "entropy_bound": _bound("entropy_bound", self.entropy_bound),
            "remask": as_remasking(self.remask),
            "temperature": _each(self.temperature, lambda value: float(checks.temperature(value))),
            "top_p": _each(self.top_p, lambda value: float(checks.top_p(value))),
            "top_k": _each(self.top_k, lambda value: _count("top_k", value)),
            "min_p": _each(self.min_p, _min_p),
            "cfg_scale": _bound("cfg_scale", self.cfg_scale) or 0.0,
            "seed": checks.integer("seed", self.seed, 0, 2**63, "an int, 0 <= seed < 2^63", ValueError),
            "plan": as_plan(self.plan),
            "forbidden": _token_ids(self.forbidden),
        }
        if isinstance(plain["top_k"], tuple) and None in plain["top_k"]:
            raise TypeError(f"top_k must be an int for each sequence, got {self.top_k!r}")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise TypeError(
                f"logits_processor must be a function or None, got {type(self.logits_processor).__name__}"
            )
        if self.eos_token_id is not None:
            plain["eos_token_id"] = _token_id("eos_token_id", self.eos_token_id)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        self._check_names()
        self._check_pace()
        self._check_together()

    def _check_names(self) -> None:
        if not isinstance(self.counts, str):
            raise TypeError(f"counts must be a name, {' or '.join(COUNTS)}, got {self.counts!r}")
        for name, accepted in (("counts", COUNTS), ("order", sorted(ORDERS))):
            value = getattr(self, name)
            if value not in accepted:
                close = meant(value, accepted)
                raise ValueError(f"unknown {name} {value!r}, accepted are {', '.join(accepted)}{close}")
        if self.dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype must be None or torch.bfloat16, got {self.dtype}")

    def _check_pace(self) -> None:
        given = self._given(*_PACES)
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, but each alone says how much a step reveals")
        if self.counts != "even" and given and self.steps is None:
            raise ValueError(
                f"counts={self.counts!r} says how steps share positions, but {given[0]} is given"
            )
        if self.threshold is not None and self.order != "entropy" and self.threshold > 1:
            raise ValueError(f"threshold must be a probability in [0, 1], got {self.threshold}")

    def _check_together(self) -> None:
        if self.block_length is not None and self.window is not None:
            raise ValueError(
                "block_length and window are both given: blocks follow each other, a window slides"
            )
        for asked, what in ((self.remask, "remasking"), (self.reference_numerics, "reference_numerics")):
            if asked and self.order != "ancestral":
                raise ValueError(f"{what} goes with the order ancestral, got {self.order}")
        if self.min_new_tokens is not None and self.eos_token_id is None:
            raise ValueError(
                "min_new_tokens says from where on eos_token_id may be drawn, which is not given"
            )
        drawn = f"the order {self.order}, which draws its reveal times"
        own = {"ancestral": "steps", "first_hitting": "tokens_per_step"}.get(self.order)
        for wanted, why, names in (
            (self.cuda_graphs and self.shapes_rows, _GRAPHS, ("cuda_graphs",)),
            (self.remask, "remasking, which may take back any token", ("block_length", "eos_token_id")),
            (self.reference_numerics, _REFERENCE, _NOT_THE_REFERENCES),
            (own, drawn, [name for name in (*_PACES, "window", "counts") if name != own]),
        ):
            if wanted and (given := self._given(*names)):
                raise ValueError(f"{given[0]} does not go with {why}")

    def _given(self, *names: str) -> list[str]:
        """Which of these are not at their default."""
        return [name for name in names if getattr(self, name) != getattr(Decoding, name)]

    def check_for(self, config: Any) -> None:
        """Raise ValueError where a model of this configuration cannot do it."""
        for name, ids in (("eos_token_id", (self.eos_token_id,)), ("forbidden", self.forbidden)):
            for token in ids:
                if token is not None and not 0 <= token < config.vocab_size:
                    raise ValueError(
                        f"{name}: {token} is no token id, accepted are 0..{config.vocab_size - 1}"
                    )
                if token == config.mask_token_id:
                    raise ValueError(f"{name}: {token} is the mask token, which is never drawn")
        if len(self.forbidden) >= config.vocab_size - 1:
            raise ValueError(f"forbidden holds all {len(self.forbidden)} tokens: none is left to draw")
        if self.block_length is not None and self.block_length > config.max_length:
            raise ValueError(
                f"block_length is {self.block_length}, beyond the model's max_length {config.max_length}"
            )

    def check_batch(self, batch: int) -> None:
        """Raise ValueError where there is not one value for each of so many sequences."""
        for name in _OF_SEQUENCES:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != batch:
                raise ValueError(f"{name} has {len(value)} values, but there are {batch} sequences")

    @property
    def shapes_rows(self) -> bool:
        """Whether rows are drawn in ways of their own, which no kernel has."""
        own = any(isinstance(getattr(self, name), tuple) for name in _OF_SEQUENCES)
        return own or bool(self._given(*_SHAPES))

    @property
    def pace(self) -> Pace:
        """How much a step reveals: what is given, else the plan's number of steps."""
        pace = Pace(*(getattr(self, name) for name in Pace._fields))
        planned = not self._given(*_PACES) and self.order != "first_hitting"
        return pace._replace(steps=self.plan.num_steps) if planned else pace

    @property
    def draws_from_the_model(self) -> bool:
        """Whether a token follows the model's own prediction."""
        plain = (self.temperature, self.top_p, self.top_k, self.forbidden) == (1, 1, None, ())
        return plain and not self.reference_numerics and not self.shapes_rows

    def num_steps(self, length: int, masks: int) -> int | None:
        """Steps that a sequence of `length` with so many masks takes; None where predictions decide."""
        pace = self.pace
        if pace.adaptive or pace.steps is not None:
            return pace.steps
        return length if self.order == "ancestral" else -(-masks // (pace.tokens_per_step or 1))


def _count(name: str, value: Any) -> int | None:
    number = whole(value)
    if value is not None and number is None:
        raise TypeError(f"{name} must be an int or None, got {value!r}")
    if number is not None and not 1 <= number <= MAX_STEPS:
        raise ValueError(f"{name} must be in 1..{MAX_STEPS}, got {number}")
    return number


def _each(value: Any, check: Callable[[Any], Any]) -> Any:
    """A checked value, or a tuple of them where a sequence or a tensor gives one for each sequence."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return check(value)
    return tuple(check(one) for one in value)


def _min_p(value: Any) -> float:
    number = real(value)
    if number is None:
        raise TypeError(f"min_p must be a number, got {value!r}")
    if not 0 <= number < 1:
        raise ValueError(f"min_p: got {number}, expected 0 <= min_p < 1")
    return float(number)


def _bound(name: str, value: Any) -> float | None:
    number = real(value)
    if value is not None and number is None:
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if number is not None and not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {number}")
    return number


def _token_ids(tokens: Any) -> tuple[int, ...]:
    """Ids that are never drawn, each once."""
    if tokens is None:
        return ()
    if isinstance(tokens, (str, bytes)):
        raise TypeError(
            "forbidden must be token ids, got a string: encode it with the model's tokenizer first"
        )
    try:
        given = list(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
    except TypeError as error:
        raise TypeError(f"forbidden must be a list of token ids, got {tokens!r}") from error
    return tuple(sorted({_token_id("forbidden", token) for token in given}))


def _token_id(name: str, token: Any) -> int:
    number = whole(token)
    if number is None:
        raise TypeError(f"{name}: a token id is an int, got {token!r}")
    return number
