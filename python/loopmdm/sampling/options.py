"""The options of `sample` that are numbers: their ranges, and which go together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loopmdm.sampling.orders import COUNTS, ORDERS, Pace
from loopmdm.sampling.remasking import Remasking
from loopmdm_kernels.values import meant, real, whole

MAX_STEPS = 2**30 - 1  # the step is one word of the random number's name


def make_pace(
    steps: int | None,
    tokens_per_step: int | None,
    threshold: float | None,
    entropy_bound: float | None,
    counts: str = "even",
) -> Pace:
    """The pace meant by the arguments, of which at most one of the first four may be given."""
    steps, tokens_per_step = count("steps", steps), count("tokens_per_step", tokens_per_step)
    threshold, entropy_bound = _bound("threshold", threshold), _bound("entropy_bound", entropy_bound)
    if not isinstance(counts, str):
        raise TypeError(f"counts must be a name, {' or '.join(COUNTS)}, got {counts!r}")
    if counts not in COUNTS:
        raise ValueError(
            f"unknown counts {counts!r}, accepted are {', '.join(COUNTS)}{meant(counts, COUNTS)}"
        )
    pace = Pace(steps, tokens_per_step, threshold, entropy_bound, counts)
    if len(pace.given) > 1:
        raise ValueError(f"{' and '.join(pace.given)} are given, but each alone says how much a step reveals")
    if counts != "even" and pace.given and steps is None:
        raise ValueError(
            f"counts={counts!r} says how steps share positions, but {next(iter(pace.given))} is given"
        )
    return pace


def check_options(
    order: str,
    pace: Pace,
    remask: Remasking | None,
    *,
    block_length: int | None,
    window: int | None,
    eos_token_id: int | None,
    dtype: torch.dtype | None,
    config: Any,
) -> None:
    """Raise TypeError or ValueError where an option is out of range or does not go with another."""
    if order not in ORDERS:
        raise ValueError(
            f"unknown order {order!r}, accepted are {', '.join(sorted(ORDERS))}{meant(order, ORDERS)}"
        )
    if block_length is not None and window is not None:
        raise ValueError("block_length and window are both given: blocks follow each other, a window slides")
    if block_length is not None and block_length > config.max_length:
        raise ValueError(f"block_length is {block_length}, beyond the model's max_length {config.max_length}")
    if pace.threshold is not None and order != "entropy" and pace.threshold > 1:
        raise ValueError(f"threshold must be a probability in [0, 1], got {pace.threshold}")
    if remask is not None:
        for name, value in (
            ("block_length", block_length),
            ("eos_token_id", eos_token_id),
        ):
            if value is not None:
                raise ValueError(f"{name} does not go with remasking, which may take back any token")
        if order != "ancestral":
            raise ValueError(f"remasking goes with the order ancestral, got {order}")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype must be None or torch.bfloat16, got {dtype}")


def make_forbidden(tokens: Any, config: Any) -> Tensor:
    """Ids [F] int64 of the tokens that are never drawn; one at least must be left."""
    given = [] if tokens is None else _ids(tokens)
    ids = sorted({token_id("forbidden", token, config) for token in given})
    if len(ids) >= config.vocab_size - 1:
        raise ValueError(f"forbidden holds all {len(ids)} tokens: none is left to draw")
    return torch.tensor(ids, dtype=torch.int64)


def count(name: str, value: Any) -> int | None:
    """A count of at least 1, or None."""
    number = whole(value)
    if value is not None and number is None:
        raise TypeError(f"{name} must be an int or None, got {value!r}")
    if number is not None and not 1 <= number <= MAX_STEPS:
        raise ValueError(f"{name} must be in 1..{MAX_STEPS}, got {number}")
    return number


def token_id(name: str, token: Any, config: Any) -> int:
    """An id that may be drawn."""
    number = whole(token)
    if number is None:
        raise TypeError(f"{name}: a token id is an int, got {token!r}")
    if not 0 <= number < config.vocab_size:
        raise ValueError(f"{name}: {number} is no token id, accepted are 0..{config.vocab_size - 1}")
    if number == config.mask_token_id:
        raise ValueError(f"{name}: {number} is the mask token, which is never drawn")
    return number


def _bound(name: str, value: Any) -> float | None:
    number = real(value)
    if value is not None and number is None:
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if number is not None and not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {number}")
    return number


def _ids(tokens: Any) -> list[Any]:
    if isinstance(tokens, (str, bytes)):
        raise TypeError(
            "forbidden must be token ids, got a string: encode it with the model's tokenizer first"
        )
    try:
        return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    except TypeError as error:
        raise TypeError(f"forbidden must be a list of token ids, got {tokens!r}") from error
