"""The tensors that travel together through an op. Shapes: see docs/notation.md."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockWeights(NamedTuple):
    """One DDiT block. Linear weights are [out, in], as in `torch.nn.Linear`."""

    norm1: Tensor  # [D] scale of the layer norm before attention
    qkv: Tensor  # [3D, D], rows ordered q, k, v; heads contiguous inside each
    attn_out: Tensor  # [D, D]
    norm2: Tensor  # [D] scale of the layer norm before the MLP
    mlp_in: Tensor  # [F, D]
    mlp_in_bias: Tensor  # [F]
    mlp_out: Tensor  # [D, F]
    mlp_out_bias: Tensor  # [D]


class Head(NamedTuple):
    """Final layer norm, modulation and vocabulary projection."""

    norm: Tensor  # [D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    modulation: Tensor  # [1 or B, 2, D]: shift, scale
    excluded_token: int = -1  # token of probability 0 (the mask); -1: none


class Rotary(NamedTuple):
    """Angles of the rotary position embedding."""

    cos: Tensor  # [L, K/2]
    sin: Tensor  # [L, K/2]


class RowRng(NamedTuple):
    """Names the random numbers of each row: equal names, equal numbers, on every backend."""

    seed: int  # 64 bits
    sequence: Tensor  # [R] int64, below 2^32
    step: Tensor  # [R] int64, below 2^30
    position: Tensor  # [R] int64, below 2^31


class SampledRows(NamedTuple):
    """What `sample_rows` returns for each row; statistics are of the distribution at temperature 1."""

    token: Tensor  # [R] int64
    log_prob: Tensor  # [R] log-probability of `token`
    top1_token: Tensor  # [R] int64
    top1_prob: Tensor  # [R]
    top2_prob: Tensor  # [R]
    entropy: Tensor  # [R] nats
