"""Checks at the public boundary: each error names the argument, what was got and what is accepted."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from loopmdm_kernels.calls import Call
from loopmdm_kernels.tracing import can_read
from loopmdm_kernels.types import (
    FP8,
    BlockWeights,
    Fp8BlockWeights,
    Fp8Head,
    Fp8Weight,
    Head,
    Rotary,
    RowRng,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STREAM_FLOATS = (torch.float32, torch.float64)
# Beyond these, logits over the temperature leave fp32, and what may not be drawn could be.
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-20, 1e20
LARGEST_DROPOUT = 1 - 2.0**-24  # the number before 1 in fp32, in which the kernels scale by 1 / (1 - rate)

_FEW = 64  # values

Value = TypeVar("Value")


def tensor(
    name: str,
    value: Any,
    *,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[Any],
    device: torch.device | None = None,
) -> Tensor:
    """Check one tensor; a dimension of `shape` is an int, a tuple of ints (any of them) or a free letter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: got a {kind} tensor, expected a dense one")
    if value.dtype not in dtypes:
        accepted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got {str(value.dtype).removeprefix('torch.')}, expected {accepted}")
    if value.shape != shape and not _fits(value.shape, shape):
        wanted = ", ".join(" or ".join(map(str, w)) if isinstance(w, tuple) else str(w) for w in shape)
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected [{wanted}]")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: on {value.device}, expected {device} like the first argument")
    return value


def plain(value: Value) -> Value:
    """The same tensors, in calls, tuples or lists of any depth, without torch's lazy negative bit.

    Kernels read memory, which for such a tensor (the `imag` of a conjugate is one) holds the opposite sign.
    """
    if torch.compiler.is_compiling():
        return value
    if isinstance(value, Call):
        items = [*vars(value).values()]
        changed = [*map(_plain, items)]
        return value if all(map(operator.is_, changed, items)) else cast("Value", type(value)(*changed))
    return cast("Value", _plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.resolve_neg() if value.is_neg() else value
    if not isinstance(value, tuple | list):
        return value
    changed = [*map(_plain, value)]
    if all(map(operator.is_, changed, value)):
        return value
    return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)


def number(name: str, value: Any, accepted: str) -> Any:
    """A real number of any type as one of Python's, or an error."""
    if isinstance(value, float | torch.SymFloat | torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Real)):
        raise TypeError(f"{name}: got {value!r}, expected {accepted}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got a number beyond float64, expected {accepted}") from None


def integer(
    name: str,
    value: Any,
    low: int,
    high: int | None,
    accepted: str,
    wrong_type: type[Exception] = TypeError,
) -> Any:
    """A whole number of any type, low <= value < high, as one of Python's, or an error."""
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
            raise wrong_type(f"{name}: got {value!r}, expected {accepted}")
        value = operator.index(value)
    if value < low or (high is not None and value >= high):
        raise ValueError(f"{name}: got {value}, expected {accepted}")
    return value


def temperature(value: Any) -> Any:
    accepted = f"0 or a number from {LEAST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g}"
    value = number("temperature", value, accepted)
    if not (value == 0 or LEAST_TEMPERATURE <= value <= LARGEST_TEMPERATURE):
        raise ValueError(f"temperature: got {value}, expected {accepted}")
    return value


def top_p(value: Any) -> Any:
    value = number("top_p", value, "0 < top_p <= 1")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"top_p: got {value}, expected 0 < top_p <= 1")
    return value


def seed(name: str, value: Any) -> Any:
    return integer(name, value, 0, 2**63, f"an int, 0 <= {name.rpartition('.')[2]} < 2^63")


def dropout(value: Any) -> Any:
    value = number("dropout", value, "0 <= dropout < 1")
    if not 0.0 <= value <= LARGEST_DROPOUT:
        raise ValueError(f"dropout: got {value}, expected 0 <= dropout < 1 (1 - 2^-24 at most)")
    return value


def exit_threshold(value: Any) -> Any:
    if value is None:
        return None
    value = number("exit_threshold", value, "None or a number >= 0")
    if not value >= 0.0:
        raise ValueError(f"exit_threshold: got {value}, expected None or a number >= 0")
    return value


def matrix(name: str, value: Any, *, shape: Sequence[Any], device: torch.device) -> None:
    """Check a weight matrix, of floats or in e4m3."""
    if not isinstance(value, Fp8Weight):
        tensor(name, value, dtypes=FLOATS, shape=shape, device=device)
        return
    tensor(f"{name}.values", value.values, dtypes=(FP8,), shape=shape, device=device)
    tensor(f"{name}.scale", value.scale, dtypes=(torch.float32,), shape=value.shape[:1], device=device)


def for_inference(name: str, compute_dtype: torch.dtype | None, **tensors: Tensor) -> None:
    """Check what fp8 weights, the argument `name`, ask of the call."""
    if compute_dtype is None:
        raise ValueError(
            f"compute_dtype: got None, expected the dtype of the products; {name} holds fp8 weights"
        )
    wanted = [key for key, value in tensors.items() if value.requires_grad]
    if wanted and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: fp8 weights are for inference, and a gradient is wanted of {', '.join(wanted)}; "
            "expected a call under torch.no_grad()"
        )


def _fits(got: Sequence[int], wanted: Sequence[Any]) -> bool:
    # A list, not a generator: checks are a good part of a small call.
    return len(got) == len(wanted) and all(
        [
            isinstance(want, str) or size == want or (isinstance(want, tuple) and size in want)
            for size, want in zip(got, wanted, strict=True)
        ]
    )


def not_empty(name: str, value: Tensor) -> None:
    if value.numel() == 0:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected no dimension of size 0")


def compute_dtype(value: torch.dtype | None) -> None:
    if value is not None and value not in FLOATS:
        raise TypeError(f"compute_dtype: got {value}, expected one of {list(FLOATS)} or None")


def rotary(value: Rotary | None, length: int, head_dim: int, device: torch.device) -> None:
    if value is not None:
        if not isinstance(value, tuple) or len(value) != 2:
            raise TypeError(f"rotary: got {_kind(value)}, expected a Rotary or None")
        for name, angle in zip(("rotary.cos", "rotary.sin"), value, strict=True):
            tensor(name, angle, dtypes=FLOATS, shape=(length, head_dim // 2), device=device)


def row_rng(value: RowRng, num_rows: int, device: torch.device) -> RowRng:
    """Check the names of random numbers; the seed as a number of Python's."""
    if not isinstance(value, RowRng):
        raise TypeError(f"rng: got {_kind(value)}, expected a RowRng")
    for name, limit in (("sequence", 2**32), ("step", 2**30), ("position", 2**31)):
        named = f"rng.{name}"
        tensor(named, getattr(value, name), dtypes=(torch.int64,), shape=(num_rows,), device=device)
        in_range(named, getattr(value, name), 0, limit)
    return value._replace(seed=seed("rng.seed", value.seed))


def block_weights(value: Sequence[BlockWeights | Fp8BlockWeights]) -> None:
    """Check that they are some, of one type."""
    if not isinstance(value, Sequence):
        raise TypeError(f"blocks: got {_kind(value)}, expected a list of BlockWeights")
    if not len(value):
        raise ValueError("blocks: got none, expected at least one")
    for index, weights in enumerate(value):
        if not isinstance(weights, BlockWeights | Fp8BlockWeights):
            raise TypeError(f"blocks[{index}]: got {_kind(weights)}, expected a BlockWeights")
    if len({type(weights) for weights in value}) > 1:
        raise TypeError("blocks: got some with fp8 weights, expected all or none")


def _kind(value: object) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def key_mask(value: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    if value is None:
        return
    tensor("key_mask", value, dtypes=(torch.bool,), shape=(batch, length), device=device)
    if can_read(value) and not bool(value.any(dim=1).all()):
        raise ValueError("key_mask: a sequence has no key to attend; expected at least one True in each row")


def head(value: Head | Fp8Head, hidden_size: int, batch: int, device: torch.device) -> int:
    """Check a vocabulary head and return V."""
    matrix("head.weight", value.weight, shape=("V", hidden_size), device=device)
    vocab_size = value.weight.shape[0]
    if not vocab_size:
        raise ValueError(
            f"head.weight: got shape {list(value.weight.shape)}, expected no dimension of size 0"
        )
    if value.norm is not None:
        tensor("head.norm", value.norm, dtypes=FLOATS, shape=(hidden_size,), device=device)
    tensor("head.bias", value.bias, dtypes=FLOATS, shape=(vocab_size,), device=device)
    tensor(
        "head.modulation", value.modulation, dtypes=FLOATS, shape=((1, batch), 2, hidden_size), device=device
    )
    integer("head.excluded_token", value.excluded_token, -1, vocab_size, f"-1 or 0..{vocab_size - 1}")
    if value.excluded_token >= 0 and vocab_size == 1:
        raise ValueError("head.excluded_token: the vocabulary has no other token")
    return vocab_size


def given_head(value: Head | Fp8Head | Tensor) -> Head | Fp8Head:
    """A weight [V, D] stands for the head that has nothing else."""
    if isinstance(value, Tensor):
        tensor("head", value, dtypes=FLOATS, shape=("V", "D"))
        return Head.of(value)
    if not isinstance(value, Head | Fp8Head):
        raise TypeError(f"head: got {type(value).__name__}, expected a Head or a weight [V, D]")
    return value


def rows(value: Tensor, num_tokens: int, device: torch.device) -> None:
    tensor("rows", value, dtypes=(torch.int64,), shape=("R",), device=device)
    in_range("rows", value, 0, num_tokens)


def in_range(name: str, value: Tensor, low: int, high: int) -> None:
    """Check low <= value < high, where reading the values needs no wait for a device."""
    if not can_read(value) or value.numel() == 0:
        return
    if value.numel() <= _FEW:  # calls of PyTorch are a good part of a small call
        numbers = value.flatten().tolist()
        smallest, largest = min(numbers), max(numbers)
    else:
        smallest, largest = map(int, value.aminmax())
    if smallest < low or largest >= high:
        raise ValueError(f"{name}: got values in {smallest}..{largest}, expected {low}..{high - 1}")
