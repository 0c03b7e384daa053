"""Philox4x32-10 (Salmon et al., SC 2011) in plain PyTorch: random numbers named by a counter and a key.

Every backend draws the same bits for the same (seed, sequence, step, position), so a sample does not
depend on the batch it was drawn in, on the number of ranks or on the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF

REVEAL_STREAM = 1 << 30  # added to the step word of reveal decisions
DROPOUT_STREAM = 1 << 31  # added to the step word of dropout masks
REFINE_BIT = 1 << 31  # added to counter word 0 for the low half of a 64-bit uniform


def _multiply_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a*b for 32-bit unsigned values held in int64."""
    low_part = a * (b & 0xFFFF)  # below 2^48
    high_part = a * (b >> 16) + (low_part >> 16)  # below 2^49
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(
    seed: int, c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (int64 tensors, broadcast shape of the counters) for counter (c0, c1, c2, c3)."""
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    words = [torch.as_tensor(c, dtype=torch.int64, device=c0.device) & _MASK32 for c in (c0, c1, c2, c3)]
    x0, x1, x2, x3 = words
    for _ in range(10):
        high0, low0 = _multiply_high_low(_MULTIPLIER_0, x0)
        high1, low1 = _multiply_high_low(_MULTIPLIER_1, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + _WEYL_0) & _MASK32, (key1 + _WEYL_1) & _MASK32
    x0, x1, x2, x3 = torch.broadcast_tensors(x0, x1, x2, x3)  # type: ignore[no-untyped-call]
    return x0, x1, x2, x3


def uniform53(seed: int, c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int) -> Tensor:
    """Uniform float64 in [0, 1) with 53 random bits (words 0 and 1 of the counter)."""
    high, low, _, _ = philox4x32(seed, c0, c1, c2, c3)
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def race_times(
    seed: int, sequence: Tensor, step: Tensor, position: Tensor, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """Standard exponential variates [R, V]: row r is the race named (seed, sequence, step, position).

    E = -log1p(-u). u has 32 random bits, and 64 where its high half is below 2^8, so that the small times,
    the only ones that win for an improbable token, keep full relative precision in fp32.
    """
    num_groups = (vocab_size + 3) // 4
    group = torch.arange(num_groups, device=sequence.device)
    counters = (position[:, None], step[:, None], sequence[:, None])
    high = torch.stack(philox4x32(seed, group[None, :], *counters), dim=-1).flatten(1)[:, :vocab_size]
    high_real = high.to(dtype)
    uniform = (high_real + 0.5) * 2.0**-32
    rows, tokens = torch.nonzero(high < 256, as_tuple=True)
    if rows.numel():
        words = torch.stack(
            philox4x32(seed, (tokens // 4) | REFINE_BIT, position[rows], step[rows], sequence[rows]), dim=-1
        )
        low = words.gather(1, (tokens % 4)[:, None]).squeeze(1)
        refined = (high_real[rows, tokens] + (low.to(dtype) + 0.5) * 2.0**-32) * 2.0**-32
        uniform = uniform.index_put((rows, tokens), refined)
    return -torch.log1p(-uniform)


def race_times_of(seed: int, sequence: Tensor, step: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """The variates of `race_times` for single tokens, float64 [N]; every argument but the seed is [N]."""
    names = (position, step, sequence)
    high, low = (
        torch.stack(philox4x32(seed, group, *names), dim=-1).gather(1, (tokens % 4)[:, None]).squeeze(1)
        for group in (tokens // 4, (tokens // 4) | REFINE_BIT)
    )
    fraction = torch.where(high < 256, (low.double() + 0.5) * 2.0**-32, 0.5)
    return -torch.log1p(-(high.double() + fraction) * 2.0**-32)


def dropout_keep(
    seed: int, application: int, branch: int, shape: torch.Size, rate: float, device: torch.device
) -> Tensor:
    """Boolean keep mask for one branch (0 attention, 1 MLP) of one block application.

    The mask is a function of its arguments alone, so a backward pass that recomputes finds it again.
    """
    num_groups = (shape.numel() + 3) // 4
    group = torch.arange(num_groups, device=device)
    words = philox4x32(seed, group & _MASK32, group >> 32, DROPOUT_STREAM | application, branch)
    bits = torch.stack(words, dim=-1).flatten()[: shape.numel()].view(shape)
    return bits >= round(rate * 2**32)
