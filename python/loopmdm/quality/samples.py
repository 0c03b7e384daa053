"""The form every metric takes samples in: [N, L] token ids, -1 behind the end of a shorter sample."""

from __future__ import annotations

import torch
from torch import Tensor


def check_samples(tokens: Tensor, mask_token_id: int | None = None, *, least: int = 1) -> Tensor:
    """Tokens on the CPU if they are samples that can be measured.

    Args:
        tokens: [N, L] integers, -1 behind the end of a sample, as in `SampleResult.tokens`.
        mask_token_id: raise where a sample holds it: a sample with masks left is not finished.
        least: the fewest samples that are accepted.

    Raises:
        TypeError, ValueError: naming what was got.
    """
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens: got {got}, expected a tensor of integers [N, L]")
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected [N, L] with L of at least 1")
    if len(tokens) < least:
        raise ValueError(f"tokens: got {len(tokens)} samples, expected at least {least}")
    tokens = tokens.detach().cpu().long()
    low = int(tokens.min())
    if low < -1:
        raise ValueError(f"tokens: got the id {low}, expected ids of at least 0, and -1 behind the end")
    inside = tokens >= 0
    gaps = (inside[:, 1:] & ~inside[:, :-1]).any(1)
    for wrong, what in ((~inside[:, 0], "has no token"), (gaps, "goes on behind a -1, which ends a sample")):
        if wrong.any():
            raise ValueError(f"tokens: sample {int(wrong.nonzero()[0])} {what}")
    if mask_token_id is not None and bool((tokens == mask_token_id).any()):
        row, column = (tokens == mask_token_id).nonzero()[0].tolist()
        raise ValueError(
            f"tokens: sample {row} holds the mask {mask_token_id} at position {column};"
            " expected finished samples"
        )
    return tokens


def lengths(tokens: Tensor) -> Tensor:
    """Tokens of each sample, [N] int64."""
    return (tokens >= 0).sum(1)
