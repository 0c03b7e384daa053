"""One block of `looped_blocks` as five launches: qkv, attention, its projection, and the two of the MLP.

The norm and its modulation are applied as the rows of a product are loaded; its moments come from the launch
that wrote them. Bias, GELU, dropout, gate and residual are applied before a result is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.triton.attention import Positions, Result, attention_forward
from loopmdm_kernels.triton.config import tiles
from loopmdm_kernels.triton.kernels.looped_blocks import (
    norm_linear_kernel,
    residual_linear_kernel,
    row_moments_kernel,
)
from loopmdm_kernels.triton.launch import launch, power_of_two, processor
from loopmdm_kernels.triton.linear import persistent_grid
from loopmdm_kernels.triton.operands import matrix, operand
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Fp8Weight
from loopmdm_kernels.values import ceil_div

STATISTICS_GROUP = 64  # as in kernels/common.py


class Stream(NamedTuple):
    """The residual stream [T, D] fp32 with the partial moments of its rows [T, groups]."""

    x: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def like(cls, x: Tensor) -> Stream:
        groups = ceil_div(x.shape[1], STATISTICS_GROUP)
        return cls(torch.empty_like(x), *(x.new_empty(x.shape[0], groups) for _ in range(2)))

    @classmethod
    def of(cls, x: Tensor) -> Stream:
        """x [T, D] with its moments."""
        stream = cls.like(x)._replace(x=x)
        rows = 4
        launch(
            row_moments_kernel,
            (ceil_div(x.shape[0], rows),),
            *stream,
            *x.shape,
            ROWS=rows,
            BLOCK_D=power_of_two(x.shape[1], STATISTICS_GROUP),
            num_warps=4,
            num_stages=1,
        )
        return stream


class Options(NamedTuple):
    """What all blocks and loops share."""

    num_heads: int
    length: int
    modulation_stride: int  # from a sequence to the next one; 0: one modulation for all
    positions: Positions
    dtype: torch.dtype
    dropout: float = 0.0
    dropout_seed: int = 0

    @classmethod
    def of(cls, call: LoopedCall) -> Options:
        return cls(
            call.num_heads,
            call.x.shape[1],
            0 if call.modulation.shape[1] == 1 else 6 * call.x.shape[2],
            Positions.of(call.key_mask, call.rotary, call.dtype),
            call.dtype,
            call.dropout,
            int(call.dropout_seed),
        )

    def dropout_arguments(self, application: int) -> tuple[int, int, int, float]:
        return self.dropout_seed, application, round(self.dropout * 2**32), 1.0 / (1.0 - self.dropout)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, L, K] where they are in [T, 3 D]."""
        parts = qkv.view(-1, self.length, 3, self.num_heads, qkv.shape[1] // 3 // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    def by_heads(self, mixed: Tensor) -> Tensor:
        """[T, D] as [B, H, L, K]."""
        return mixed.view(-1, self.length, self.num_heads, mixed.shape[1] // self.num_heads).transpose(1, 2)


class Exit(NamedTuple):
    """Where a loop's last launch writes the squares that the exit depends on."""

    start: Tensor  # [T, D], the input of the loop
    change: Tensor  # [2, T, tiles of columns]


class Record(NamedTuple):
    """What the backward pass of a block reads."""

    start: Tensor  # [T, D] fp32
    h1: Tensor
    qkv: Tensor
    mixed: Tensor
    attention: Result  # `out` is mixed
    branch1: Tensor
    middle: Tensor  # [T, D] fp32
    h2: Tensor
    before: Tensor  # argument of GELU
    activated: Tensor
    branch2: Tensor


def cast_weights(call: LoopedCall) -> list[BlockWeights | Fp8BlockWeights]:
    """Matrices and biases in the dtype of the products, once a call; norms and fp8 matrices as they are."""

    def cast(name: str, weight: Any) -> Any:
        if isinstance(weight, Fp8Weight):
            return weight
        return weight.detach().contiguous() if name.startswith("norm") else operand(weight, call.dtype)

    return [type(block)(*map(cast, block._fields, block)) for block in call.blocks]


def residual_columns(rows: int, columns: int, depth: int, dtype: torch.dtype, device: torch.device) -> int:
    """Columns of a tile of the product with a residual."""
    return tiles("residual_linear", (rows, columns, depth), dtype, processor(device)).n


def block_forward(
    stream: Stream,
    weights: BlockWeights | Fp8BlockWeights,
    modulation: Tensor,
    options: Options,
    application: int,
    *,
    active: Tensor | None = None,
    exit_to: Exit | None = None,
    keep: bool = False,
) -> tuple[Stream, Record | None]:
    """One block; modulation [1 or B, 6, D] in the dtype of the products. `keep`: also make the record.

    A record holds numbers, not leftovers of memory, for sequences that are not active too.
    """
    computed = None if keep else active
    h1, qkv, _ = norm_linear(
        stream, weights.norm1, modulation[:, 0:2], weights.qkv, None, options, computed, gelu=False, keep=keep
    )
    mixed = torch.empty(stream.x.shape, dtype=options.dtype, device=stream.x.device)
    result = Result.empty(options.by_heads(mixed), keep=keep)
    attention_forward(*options.split(qkv), options.positions, result, computed)
    middle, branch1 = residual_linear(
        mixed, weights.attn_out, None, modulation[:, 2], stream, options, (application, 0), active, None, keep
    )
    up, down = (weights.mlp_in, weights.mlp_in_bias), (weights.mlp_out, weights.mlp_out_bias)
    h2, activated, before = norm_linear(
        middle, weights.norm2, modulation[:, 3:5], *up, options, computed, gelu=True, keep=keep
    )
    end, branch2 = residual_linear(
        activated, *down, modulation[:, 5], middle, options, (application, 1), active, exit_to, keep
    )
    if h1 is None or h2 is None or branch1 is None or branch2 is None or before is None:
        return end, None
    kept = (stream.x, h1, qkv, mixed, result, branch1, middle.x, h2, before, activated, branch2)
    return end, Record(*kept)


def norm_linear(
    stream: Stream,
    norm: Tensor,
    modulation: Tensor,
    weight: Tensor | Fp8Weight,
    bias: Tensor | None,
    options: Options,
    active: Tensor | None,
    *,
    gelu: bool,
    keep: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """act(modulate(norm(x)) weight^T + bias); with `keep` also the modulated rows and GELU's argument.

    modulation: shift and scale, [1 or B, 2, D].
    """
    (rows, depth), columns = stream.x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=options.dtype, device=stream.x.device)
    h = torch.empty(rows, depth, dtype=options.dtype, device=out.device) if keep else None
    before = torch.empty_like(out) if keep and gelu else None
    tile = tiles("norm_linear", (rows, columns, depth), options.dtype, processor(out.device))
    launch(
        norm_linear_kernel,
        persistent_grid(tile, rows, columns, out.device),
        *(*stream, norm, modulation, *matrix(weight, options.dtype), bias, active, h, before, out),
        *(rows, columns, depth, options.length, options.modulation_stride),
        GELU=gelu,
        ONE_SEQUENCE=options.modulation_stride == 0 or options.length % tile.m == 0,
        GROUPS=power_of_two(stream.mean.shape[1]),
        **tile.options(),
    )
    return h, out, before


def residual_linear(
    a: Tensor,
    weight: Tensor | Fp8Weight,
    bias: Tensor | None,
    gate: Tensor,
    stream: Stream,
    options: Options,
    place: tuple[int, int],
    active: Tensor | None,
    exit_to: Exit | None,
    keep: bool,
) -> tuple[Stream, Tensor | None]:
    """x + gate * dropout(a weight^T + bias); with `keep` also what the gate multiplies.

    place: number of the application, and of the branch: 0 attention, 1 MLP.
    """
    application, branch = place
    (rows, depth), columns = a.shape, weight.shape[0]
    out = Stream.like(stream.x)
    kept = torch.empty(rows, columns, dtype=options.dtype, device=a.device) if keep else None
    tile = tiles("residual_linear", (rows, columns, depth), options.dtype, processor(a.device))
    launch(
        residual_linear_kernel,
        persistent_grid(tile, rows, columns, a.device),
        *(a, *matrix(weight, options.dtype), bias, gate, stream.x, active, kept, *(exit_to or (None, None))),
        *(out.mean, out.square, out.x, rows, columns, depth, options.length, options.modulation_stride),
        *options.dropout_arguments(application),
        BRANCH=branch,
        DROPOUT=options.dropout > 0.0,
        **tile.options(),
    )
    return out, kept
