"""The starting state of a run: [B, L] token ids with the mask token at every position to fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DEFAULT_NUM_SAMPLES = 8
MAX_SEQUENCE_ID = 2**32 - 1


def make_canvas(
    config: Any, num_samples: int | None, length: int | None, prompt: Any, infill: Tensor | None
) -> Tensor:
    """Canvas [B, L] int64 on the CPU from the arguments of `sample`; checks all of them."""
    if num_samples is not None:
        _check_count("num_samples", num_samples)
    if length is not None:
        _check_count("length", length)
    if prompt is not None and infill is not None:
        raise ValueError(
            "prompt and infill are both given: write the prompt into infill, or give one of them"
        )
    if infill is not None:
        canvas = _from_infill(config, num_samples, length, infill)
    else:
        canvas = _from_prompt(config, num_samples, config.max_length if length is None else length, prompt)
    if canvas.shape[1] > config.max_length:
        raise ValueError(f"length is {canvas.shape[1]}, but the model's max_length is {config.max_length}")
    return canvas


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


def _from_infill(config: Any, num_samples: int | None, length: int | None, infill: Tensor) -> Tensor:
    tokens = _token_tensor("infill", infill)
    if tokens.ndim not in (1, 2) or not tokens.numel():
        raise ValueError(f"infill must be [L] or [B, L] and not empty, got shape {tuple(tokens.shape)}")
    if length is not None and tokens.shape[-1] != length:
        raise ValueError(f"infill is {tokens.shape[-1]} tokens long, but length is {length}")
    _check_ids("infill", tokens, config)
    return _repeated("infill", tokens, num_samples).clone()


def _from_prompt(config: Any, num_samples: int | None, length: int, prompt: Any) -> Tensor:
    rows = _prompt_rows(prompt, num_samples)
    canvas = torch.full((len(rows), length), config.mask_token_id, dtype=torch.int64)
    for index, row in enumerate(rows):
        if row.numel() > length:
            raise ValueError(
                f"prompt {index} is {row.numel()} tokens long, beyond the length {length} of the sample"
            )
        if not row.numel():
            continue
        _check_ids("prompt", row, config)
        if bool((row == config.mask_token_id).any()):
            raise ValueError(
                f"prompt {index} contains the mask token id {config.mask_token_id}: use infill to fill"
                " positions between given tokens"
            )
        canvas[index, : row.numel()] = row
    return canvas


def _prompt_rows(prompt: Any, num_samples: int | None) -> list[Tensor]:
    if prompt is None:
        return [torch.empty(0, dtype=torch.int64)] * (num_samples or DEFAULT_NUM_SAMPLES)
    nested = isinstance(prompt, Sequence) and any(isinstance(row, (Sequence, Tensor)) for row in prompt)
    if not nested:
        tokens = _token_tensor("prompt", prompt)
        if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and not tokens.shape[0]):
            raise ValueError(
                f"prompt must be [P], [B, P] or a list of token lists, got shape {tuple(tokens.shape)}"
            )
        return list(_repeated("prompt", tokens, num_samples))
    rows = [_token_tensor(f"prompt {index}", row) for index, row in enumerate(prompt)]
    for index, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(f"prompt {index} must be a flat list of token ids, got shape {tuple(row.shape)}")
    if num_samples not in (None, len(rows)):
        raise ValueError(f"num_samples is {num_samples}, but prompt has {len(rows)} sequences")
    return rows


def _repeated(name: str, tokens: Tensor, num_samples: int | None) -> Tensor:
    """tokens as [B, L]: one row is repeated for every sample, several must be as many as the samples."""
    if tokens.ndim == 1:
        return tokens.expand(num_samples or DEFAULT_NUM_SAMPLES, -1)
    if num_samples not in (None, tokens.shape[0]):
        raise ValueError(f"num_samples is {num_samples}, but {name} has {tokens.shape[0]} sequences")
    return tokens


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


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
