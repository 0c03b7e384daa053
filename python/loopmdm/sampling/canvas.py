"""The starting state of a run: token ids, with the mask token at every position to fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loopmdm_kernels.values import positive

DEFAULT_NUM_SAMPLES = 8
MAX_SEQUENCE_ID = 2**32 - 1
_MOST_POSITIONS = 2**31 - 1
PADDING = -1  # behind the end of a sequence that is shorter than others of its batch


class Canvas(NamedTuple):
    """Where a run starts, on the CPU."""

    tokens: Tensor  # [B, L] int64
    lengths: Tensor  # [B] int64; behind them is PADDING


def make_canvas(
    config: Any,
    num_samples: int | None,
    length: Any,
    prompt: Any,
    infill: Any,
    block_length: int | None = None,
) -> Canvas:
    """The canvas meant by the arguments of `sample`; checks all of them."""
    if num_samples is not None:
        num_samples = positive("num_samples", num_samples)
    lengths, prompts, infills = _lengths(length), _rows("prompt", prompt), _rows("infill", infill)
    arguments = {"length": lengths, "prompt": prompts, "infill": infills}
    batch = _batch_size(num_samples, arguments)
    alike = not any(given is not None and given.each for given in arguments.values())
    rows = []
    for index in range(1 if alike else batch):
        size, filled = _of(lengths, index), _of(infills, index)
        _check_length(config, size, block_length)  # before it takes memory
        if filled is None:
            row = torch.full((config.max_length if size is None else size,), config.mask_token_id)
        else:
            row = _infill_row(config, filled, size)
        if prompts is not None:
            _write_prompt(config, row, prompts.of(index), index)
        rows.append(row)
        _check_length(config, row.numel(), block_length)
    sizes = torch.tensor([row.numel() for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    return Canvas(*(field.repeat_interleave(batch // len(rows), dim=0) for field in (tokens, sizes)))


def _check_length(config: Any, length: int | None, block_length: int | None) -> None:
    if length is not None and length > config.max_length and block_length is None:
        raise ValueError(
            f"length is {length}, but the model's max_length is {config.max_length}; a block_length lets it"
            " write longer sequences, block by block"
        )
    if length is not None and length > _MOST_POSITIONS:
        raise ValueError(f"length must be below 2^31, as random numbers are named by position, got {length}")


def make_sequence_ids(sequence_ids: Any, num_samples: int) -> Tensor:
    """Ids [B] int64 on the CPU that name the random numbers of each sequence; default 0..B - 1."""
    if sequence_ids is None:
        return torch.arange(num_samples)
    ids = _token_tensor("sequence_ids", sequence_ids)
    if ids.shape != (num_samples,):
        raise ValueError(
            f"sequence_ids has shape {tuple(ids.shape)}, expected ({num_samples},), one id per sequence"
        )
    if int(ids.min()) < 0 or int(ids.max()) > MAX_SEQUENCE_ID:
        raise ValueError(
            f"sequence_ids must be in 0..{MAX_SEQUENCE_ID}, got {int(ids.min())}..{int(ids.max())}"
        )
    return ids


class _Given(NamedTuple):
    """An argument that has one value for every sequence, or the same for all."""

    values: Sequence[Any]
    each: bool

    def of(self, index: int) -> Any:
        return self.values[index if self.each else 0]


def _of(given: _Given | None, index: int) -> Any:
    return None if given is None else given.of(index)


def _batch_size(num_samples: int | None, arguments: dict[str, _Given | None]) -> int:
    sizes = {name: len(given.values) for name, given in arguments.items() if given is not None and given.each}
    if num_samples is not None:
        sizes = {"num_samples": num_samples, **sizes}
    for name, size in sizes.items():
        first, expected = next(iter(sizes.items()))
        if size != expected:
            what = f"num_samples is {expected}" if first == "num_samples" else f"{first} has {expected}"
            raise ValueError(f"{what}, but {name} has {size} sequences")
    return next(iter(sizes.values()), DEFAULT_NUM_SAMPLES)


def _lengths(length: Any) -> _Given | None:
    if length is None:
        return None
    each = isinstance(length, (Sequence, Tensor, np.ndarray)) and not isinstance(length, str)
    values = (list(length) if isinstance(length, Sequence) else length.tolist()) if each else [length]
    if not isinstance(values, list) or not values:
        raise ValueError(f"length must be an int or one int a sequence, got {length!r}")
    return _Given(
        [positive(f"length {i}" if each else "length", value) for i, value in enumerate(values)], each
    )


def _rows(name: str, value: Any) -> _Given | None:
    """Token rows from [L], [B, L] or a list of rows of any lengths."""
    if value is None:
        return None
    if isinstance(value, Sequence) and any(isinstance(row, (Sequence, Tensor)) for row in value):
        rows = [_token_tensor(f"{name} {index}", row) for index, row in enumerate(value)]
        for index, row in enumerate(rows):
            if row.ndim != 1:
                raise ValueError(
                    f"{name} {index} must be a flat list of token ids, got shape {tuple(row.shape)}"
                )
        return _Given(rows, each=True)
    tokens = _token_tensor(name, value)
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and not tokens.shape[0]):
        raise ValueError(
            f"{name} must be token ids [L], [B, L] or a list of token lists, and not empty,"
            f" got shape {tuple(tokens.shape)}"
        )
    return _Given([tokens], each=False) if tokens.ndim == 1 else _Given(list(tokens), each=True)


def _infill_row(config: Any, tokens: Tensor, length: int | None) -> Tensor:
    if not tokens.numel():
        raise ValueError("infill must not be empty: give the mask token where there is something to fill")
    if length is not None and tokens.numel() != length:
        raise ValueError(f"infill is {tokens.numel()} tokens long, but length is {length}")
    _check_ids("infill", tokens, config)
    return tokens.clone()


def _write_prompt(config: Any, row: Tensor, prompt: Tensor, index: int) -> None:
    """Put a prompt at the start of a row; tokens that are already there must agree with it."""
    size = prompt.numel()
    if size > row.numel():
        raise ValueError(
            f"prompt {index} is {size} tokens long, beyond the length {row.numel()} of the sample"
        )
    if not size:
        return
    _check_ids("prompt", prompt, config)
    if bool((prompt == config.mask_token_id).any()):
        raise ValueError(
            f"prompt {index} contains the mask token id {config.mask_token_id}: use infill to fill"
            " positions between given tokens"
        )
    head = row[:size]
    differs = (head != config.mask_token_id) & (head != prompt)
    if bool(differs.any()):
        place = int(differs.nonzero()[0])
        raise ValueError(
            f"prompt {index} and infill contradict each other at position {place}:"
            f" {int(prompt[place])} and {int(head[place])}"
        )
    head.copy_(prompt)


def _token_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, str):
        raise TypeError(f"{name} must be token ids, got a string: encode it with the model's tokenizer first")
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integer ids, got {type(value).__name__}: {error}") from error
    if not tensor.numel():
        return tensor.to("cpu", torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")
    return tensor.to("cpu", torch.int64)


def _check_ids(name: str, tokens: Tensor, config: Any) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"{name} has ids in {low}..{high}, accepted are 0..{config.vocab_size - 1}")
