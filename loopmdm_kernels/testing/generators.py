"""Random inputs of the ops. Nothing is zero: zero-initialised tensors make every test of a block vacuous."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.types import BlockWeights, Head, Rotary, RowRng


class LoopedInputs(NamedTuple):
    """Arguments of `looped_blocks`, in float64; `to` rounds them."""

    x: Tensor
    blocks: list[BlockWeights]
    modulation: Tensor
    rotary: Rotary | None
    key_mask: Tensor | None
    num_heads: int

    def to(
        self,
        dtype: torch.dtype,
        *,
        requires_grad: bool = False,
        device: torch.device | str | None = None,
    ) -> LoopedInputs:
        """Weights and modulation in `dtype`, the stream x and the norms in float32 or wider, on `device`."""
        stream = torch.promote_types(dtype, torch.float32)

        def leaf(value: Tensor, kind: torch.dtype) -> Tensor:
            return value.detach().to(device, kind).clone().requires_grad_(requires_grad)

        return self._replace(
            x=leaf(self.x, stream),
            blocks=[BlockWeights(*(leaf(w, dtype) for w in block)) for block in self.blocks],
            modulation=leaf(self.modulation, dtype),
            rotary=None
            if self.rotary is None
            else Rotary(*(angle.to(device, stream) for angle in self.rotary)),
            key_mask=None if self.key_mask is None else self.key_mask.to(device),
        )

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that has a gradient, by name."""
        named = {"x": self.x, "modulation": self.modulation}
        for index, block in enumerate(self.blocks):
            named.update({f"blocks[{index}].{key}": value for key, value in block._asdict().items()})
        return named


def looped_inputs(
    batch: int = 2,
    length: int = 16,
    hidden: int = 32,
    num_heads: int = 4,
    num_blocks: int = 2,
    mlp_ratio: int = 4,
    *,
    per_sequence_modulation: bool = False,
    rotary: bool = True,
    key_mask: bool = False,
    seed: int = 0,
) -> LoopedInputs:
    """Inputs whose residual stream stays of order one over many loops."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    def linear(out_features: int, in_features: int) -> Tensor:
        return normal(out_features, in_features, scale=in_features**-0.5)

    wide = mlp_ratio * hidden
    blocks = [
        BlockWeights(
            norm1=1 + normal(hidden, scale=0.1),
            qkv=linear(3 * hidden, hidden),
            attn_out=linear(hidden, hidden),
            norm2=1 + normal(hidden, scale=0.1),
            mlp_in=linear(wide, hidden),
            mlp_in_bias=normal(wide, scale=0.1),
            mlp_out=linear(hidden, wide),
            mlp_out_bias=normal(hidden, scale=0.1),
        )
        for _ in range(num_blocks)
    ]
    rows = batch if per_sequence_modulation else 1
    modulation = normal(num_blocks, rows, 6, hidden, scale=0.3)
    angles = None
    if rotary:
        frequency = 10_000.0 ** -(
            torch.arange(0, hidden // num_heads, 2, dtype=torch.float64) * num_heads / hidden
        )
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
        angles = Rotary(angle.cos(), angle.sin())
    mask = None
    if key_mask:
        mask = torch.rand(batch, length, generator=generator) < 0.7
        mask[:, 0] = True
    return LoopedInputs(normal(batch, length, hidden), blocks, modulation, angles, mask, num_heads)


def head_inputs(
    batch: int = 2,
    length: int = 16,
    hidden: int = 32,
    vocab_size: int = 50,
    *,
    excluded_token: int = -1,
    per_sequence_modulation: bool = False,
    spread: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Head]:
    """(hidden [B, L, D], head) in float64; `spread` is about the standard deviation of the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = Head(
        norm=1 + 0.1 * normal(hidden),
        weight=normal(vocab_size, hidden) * spread * hidden**-0.5,
        bias=0.1 * normal(vocab_size),
        modulation=0.3 * normal(batch if per_sequence_modulation else 1, 2, hidden),
        excluded_token=excluded_token,
    )
    return normal(batch, length, hidden), head


def row_rng(num: int, seed: int = 0, *, step: int = 0) -> RowRng:
    """Distinct names of random numbers for `num` rows: sequences 0..num-1 at position 0."""
    return RowRng(
        seed,
        torch.arange(num),
        torch.full((num,), step, dtype=torch.int64),
        torch.zeros(num, dtype=torch.int64),
    )
