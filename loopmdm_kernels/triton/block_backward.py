"""Gradients of one block. Those of the weights are added to fp32 sums that live for all loops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.triton.attention import attention_backward
from loopmdm_kernels.triton.block import Options, Record
from loopmdm_kernels.triton.kernels.looped_blocks_backward import branch_backward_kernel
from loopmdm_kernels.triton.kernels.modulated_rows import modulated_rows_backward_kernel
from loopmdm_kernels.triton.launch import launch, power_of_two
from loopmdm_kernels.triton.linear import linear, weight_gradient
from loopmdm_kernels.types import BlockWeights
from loopmdm_kernels.values import ceil_div

_PART = 32  # rows of a program that sums over rows


class Gradients(NamedTuple):
    """Sums of one block over the loops, fp32."""

    qkv: Tensor
    attn_out: Tensor
    mlp_in: Tensor
    mlp_in_bias: Tensor
    mlp_out: Tensor
    mlp_out_bias: Tensor
    norms: Tensor  # [2, 3, B, parts, D]: norm, shift and scale of each norm, partial sums over rows
    gates: Tensor  # [2, B, parts, D]

    @classmethod
    def zeros(cls, block: BlockWeights, batch: int, length: int) -> Gradients:
        def like(weight: Tensor) -> Tensor:
            return torch.zeros(weight.shape, device=weight.device, dtype=torch.float32)

        partial = (batch, ceil_div(length, _PART), block.norm1.shape[0])
        return cls(
            like(block.qkv),
            like(block.attn_out),
            like(block.mlp_in),
            like(block.mlp_in_bias),
            like(block.mlp_out),
            like(block.mlp_out_bias),
            torch.zeros(2, 3, *partial, device=block.norm1.device, dtype=torch.float32),
            torch.zeros(2, *partial, device=block.norm1.device, dtype=torch.float32),
        )

    def finish(self, block: BlockWeights, modulation_rows: int) -> tuple[list[Tensor], Tensor]:
        """Gradients in the order and dtypes of `block`, and of its modulation [M, 6, D] in fp32."""
        norms, gates = self.norms.sum(dim=3), self.gates.sum(dim=2)
        shift1, scale1, shift2, scale2 = norms[:, 1:].flatten(0, 1)
        modulation = torch.stack((shift1, scale1, gates[0], shift2, scale2, gates[1]), dim=1)
        if modulation_rows == 1:
            modulation = modulation.sum(dim=0, keepdim=True)
        of_norms = norms[:, 0].sum(dim=1)
        in_order = BlockWeights(
            of_norms[0],
            self.qkv,
            self.attn_out,
            of_norms[1],
            self.mlp_in,
            self.mlp_in_bias,
            self.mlp_out,
            self.mlp_out_bias,
        )
        return [g.to(w.dtype) for g, w in zip(in_order, block, strict=True)], modulation


def block_backward(
    grad: Tensor,
    record: Record,
    weights: BlockWeights,
    modulation: Tensor,
    options: Options,
    place: tuple[int, int],
    used: Tensor | None,
    sums: Gradients,
) -> None:
    """Turns grad [T, D] fp32 of the block's result into that of its input, in place, and adds to `sums`.

    place: number of the application, and of the loop. used: [B] loops of each sequence; those that did not
    take this one pass their gradient through.
    """
    application, loop = place
    batch, parts, size = sums.gates.shape[1:]

    def of_branch(branch: Tensor, index: int) -> Tensor:
        out = torch.empty_like(branch)
        launch(
            branch_backward_kernel,
            (batch * parts,),
            *(grad, branch, modulation[:, 3 * index + 2], used, out, sums.gates[index]),
            *(size, options.length, options.modulation_stride, loop),
            *options.dropout_arguments(application),
            BRANCH=index,
            DROPOUT=options.dropout > 0.0,
            PART=_PART,
            BLOCK_D=power_of_two(size, 4),
            num_warps=4,
            num_stages=1,
        )
        return out

    def of_norm(x: Tensor, norm: Tensor, grad_h: Tensor, index: int) -> None:
        launch(
            modulated_rows_backward_kernel,
            (batch * parts,),
            *(x, None, norm, modulation[:, 3 * index : 3 * index + 2], grad_h, grad, *sums.norms[index]),
            *(options.length, size, options.length, options.modulation_stride),
            PART=_PART,
            HAS_ROWS=False,
            OWN_ROWS=False,
            BLOCK_D=power_of_two(size),
            num_warps=4,
            num_stages=1,
        )

    of_result = of_branch(record.branch2, 1)
    weight_gradient(of_result, record.activated, sums.mlp_out, sums.mlp_out_bias, accumulate=True)
    of_before = linear(of_result, weights.mlp_out, transposed=True, before=record.before)
    weight_gradient(of_before, record.h2, sums.mlp_in, sums.mlp_in_bias, accumulate=True)
    of_h = linear(of_before, weights.mlp_in, transposed=True, out_dtype=torch.float32)
    of_norm(record.middle, weights.norm2, of_h, 1)

    of_result = of_branch(record.branch1, 0)
    weight_gradient(of_result, record.mixed, sums.attn_out, accumulate=True)
    of_mixed = linear(of_result, weights.attn_out, transposed=True)
    of_qkv = torch.empty_like(record.qkv)
    of_heads, of_each = options.by_heads(of_mixed), options.split(of_qkv)
    attention_backward(*options.split(record.qkv), options.positions, record.attention, of_heads, of_each)
    weight_gradient(of_qkv, record.h1, sums.qkv, accumulate=True)
    of_h = linear(of_qkv, weights.qkv, transposed=True, out_dtype=torch.float32)
    of_norm(record.start, weights.norm1, of_h, 0)
