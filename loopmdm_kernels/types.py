"""The tensors that travel together through an op. Shapes: see docs/notation.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


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


class Fp8Weight(NamedTuple):
    """A matrix [out, in] for inference: numbers in e4m3, and the power of two each row is multiplied by.

    So bf16 holds the matrix exactly, and products that are scaled afterwards have the bits of its products.
    """

    values: Tensor  # [out, in] float8_e4m3fn
    scale: Tensor  # [out] float32

    @classmethod
    def of(cls, weight: Tensor) -> Fp8Weight:
        """weight [out, in] rounded to nearest: by at most 2^-4 of a number, or 2^-17 of the row's largest."""
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        _, exponent = torch.frexp(wide.abs().amax(dim=1) / torch.finfo(FP8).max)
        scale = torch.ldexp(torch.ones_like(wide[:, 0]), exponent.clamp(min=-126))
        return cls((wide / scale[:, None]).to(FP8).contiguous(), scale.float())

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return (self.values.to(wide) * self.scale.to(wide)[:, None]).to(dtype)


class Fp8BlockWeights(NamedTuple):
    """`BlockWeights` for inference with e4m3 matrices."""

    norm1: Tensor
    qkv: Fp8Weight
    attn_out: Fp8Weight
    norm2: Tensor
    mlp_in: Fp8Weight
    mlp_in_bias: Tensor
    mlp_out: Fp8Weight
    mlp_out_bias: Tensor

    @classmethod
    def of(cls, weights: BlockWeights) -> Fp8BlockWeights:
        return cls(*(Fp8Weight.of(w) if w.ndim == 2 else w.detach() for w in weights))  # type: ignore[arg-type]

    def dequantized(self, dtype: torch.dtype) -> BlockWeights:
        return BlockWeights(*(w.dequantized(dtype) if isinstance(w, Fp8Weight) else w for w in self))


class Head(NamedTuple):
    """Final layer norm, modulation and vocabulary projection."""

    norm: Tensor | None  # [D] scale of the layer norm; None: no norm, rows are taken as they are
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    modulation: Tensor  # [1 or B, 2, D]: shift, scale
    excluded_token: int = -1  # token of probability 0 (the mask); -1: none

    @classmethod
    def of(
        cls,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        norm: Tensor | None = None,
        modulation: Tensor | None = None,
        excluded_token: int = -1,
    ) -> Head:
        """A head of a weight [V, D] alone, logits = hidden weight^T, and of what else is given."""
        vocab_size, hidden_size = weight.shape
        if bias is None:
            bias = weight.new_zeros(vocab_size)
        if modulation is None:
            modulation = weight.new_zeros(1, 2, hidden_size)
        return cls(norm, weight, bias, modulation, excluded_token)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """norm, weight, bias and modulation, of a head with a norm."""
        assert self.norm is not None
        return self.norm, self.weight, self.bias, self.modulation


class Fp8Head(NamedTuple):
    """`Head` for inference with an e4m3 projection."""

    norm: Tensor | None
    weight: Fp8Weight
    bias: Tensor
    modulation: Tensor
    excluded_token: int = -1

    @classmethod
    def of(cls, head: Head) -> Fp8Head:
        norm, weight, bias, modulation, excluded_token = head
        norm = None if norm is None else norm.detach()
        return cls(norm, Fp8Weight.of(weight), bias.detach(), modulation.detach(), excluded_token)

    def dequantized(self, dtype: torch.dtype) -> Head:
        norm, weight, bias, modulation, excluded_token = self
        return Head(norm, weight.dequantized(dtype), bias, modulation, excluded_token)


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


class RevealRule(NamedTuple):
    """Which of N masked positions, the slots, a step predicts and reveals: a decoding order as data.

    A rating is "confidence", "margin", "certainty" (the negative entropy), "place", or "none": the very slots
    that the schedule has for the step.
    """

    # Slots by step [N] int64, and where each step's end [T] int64. Rated, a step reveals as many slots of a
    # sequence as it has here. None: the leading run of the best rated that pass, at least one.
    schedule: tuple[Tensor, Tensor] | None
    rating: str = "none"
    score: str = "none"  # what must reach the threshold
    place: Tensor | None = None  # [N] float64, the lowest first
    threshold: float | None = None
    entropy_bound: float | None = None  # without a threshold: sum H - max H of the run stays within it
    window: int | None = None  # only so many leftmost masks of a sequence are in reach


class SampledRows(NamedTuple):
    """What `sample_rows` returns for each row; statistics are of the distribution at temperature 1.

    Where they were not asked for they are NaN, and `top1_token` is -1.
    """

    token: Tensor  # [R] int64
    log_prob: Tensor  # [R] log-probability of `token`
    top1_token: Tensor  # [R] int64
    top1_prob: Tensor  # [R]
    top2_prob: Tensor  # [R]
    entropy: Tensor  # [R] nats

    @classmethod
    def empty(
        cls, num_rows: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> SampledRows:
        """Memory for so many rows."""
        return cls(
            *(
                torch.empty(num_rows, dtype=torch.int64 if name.endswith("token") else dtype, device=device)
                for name in cls._fields
            )
        )

    @classmethod
    def of_tokens(cls, token: Tensor, dtype: torch.dtype = torch.float32) -> SampledRows:
        """Without statistics."""
        out = cls.empty(len(token), token.device, dtype)  # each of its own memory, as an operator's must be
        for value in out[1:]:
            value.fill_(-1 if value.dtype == token.dtype else torch.nan)
        return out._replace(token=token)
