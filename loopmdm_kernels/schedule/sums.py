"""The sums over rows that the backward pass leaves behind, and the gradients they are parts of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from loopmdm_kernels.types import BlockWeights


class RowSums(NamedTuple):
    """Partial sums over the rows of each sequence, in the dtype of x; g is the gradient of the stream."""

    norms: Tensor  # [n, 2, 2, B, parts, D]: gradient of modulated rows, times the normalised rows and plain
    gates: Tensor  # [n, 2, B, parts, D]: g times the branch
    grad_branch: Tensor  # [n, B, parts, D]: g at the MLP branch, before the gate
    grad_mlp_in_bias: Tensor  # [n, B, parts of another kind, F]


class WeightSums(NamedTuple):
    """Gradients of the matrices, [n, out, in] in the dtype of x."""

    qkv: Tensor
    attn_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor


def finish(
    rows: RowSums, weights: WeightSums, blocks: Sequence[BlockWeights], modulation: Tensor
) -> tuple[list[BlockWeights], Tensor]:
    """Gradients of the blocks and of the modulation, in their dtypes."""
    dtype = rows.norms.dtype
    product, plain = rows.norms.sum(-2).unbind(2)  # [n, 2, B, D]
    gates, grad_branch = rows.gates.sum(-2), rows.grad_branch.sum(-2)
    vectors = modulation.to(dtype).transpose(1, 2)  # [n, 6, 1 or B, D]
    grad_modulation = plain.new_empty(plain.shape[0], 6, *plain.shape[2:])
    grads = []
    for layer, block in enumerate(blocks):
        grad_norms = (product[layer] * (1 + vectors[layer, [1, 4]])).sum(1)
        for branch, norm in enumerate((block.norm1, block.norm2)):
            grad_modulation[layer, 3 * branch] = plain[layer, branch]
            grad_modulation[layer, 3 * branch + 1] = product[layer, branch] * norm.to(dtype)
            grad_modulation[layer, 3 * branch + 2] = gates[layer, branch]
        in_order = BlockWeights(
            norm1=grad_norms[0],
            qkv=weights.qkv[layer],
            attn_out=weights.attn_out[layer],
            norm2=grad_norms[1],
            mlp_in=weights.mlp_in[layer],
            mlp_in_bias=rows.grad_mlp_in_bias[layer].flatten(0, -2).sum(0),
            mlp_out=weights.mlp_out[layer],
            mlp_out_bias=(vectors[layer, 5] * grad_branch[layer]).sum(0),
        )
        grads.append(BlockWeights(*(g.to(w.dtype) for g, w in zip(in_order, block, strict=True))))
    grad_modulation = grad_modulation.transpose(1, 2)
    if modulation.shape[1] == 1:
        grad_modulation = grad_modulation.sum(1, keepdim=True)
    return grads, grad_modulation.to(modulation.dtype)
