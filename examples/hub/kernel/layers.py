"""Layers for `kernels.kernelize`: a forward for modules that have the parameters of MDLM's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .ops.attention import attention
from .ops.head_logits import head_logits
from .ops.looped_blocks import looped_blocks
from .ops.masked_cross_entropy import masked_cross_entropy
from .types import BlockWeights, Head, Rotary


class MaskedCrossEntropy(nn.Module):
    """The weighted loss of masked rows [R] of hidden states [B, L, D] fp32: no logits are kept in memory.

    norm: [D] scale of the layer norm before the projection; weight: [V, D]; targets: [B, L].
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, hidden: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, row_weights: Tensor
    ) -> Tensor:
        return masked_cross_entropy(hidden, Head.of(weight, norm=norm), targets, rows, row_weights)[0]


class BidirectionalAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v of [B, H, L, K]; key_mask [B, L] is True at keys that count."""

    can_torch_compile = True
    has_backward = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return attention(q, k, v, key_mask=key_mask)


class DDiTBlock(nn.Module):
    """A block of MDLM's transformer on the residual stream x [B, L, D] fp32, for c [1 or B, cond_dim]."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        c: Tensor,
        *,
        key_mask: Tensor | None = None,
        dropout: Any = None,
    ) -> Tensor:
        if dropout is not None and dropout.rate:
            raise ValueError(f"dropout: got a rate of {dropout.rate}, this layer computes without dropout")
        weights = BlockWeights(
            self.norm1.weight,
            self.attn_qkv.weight,
            self.attn_out.weight,
            self.norm2.weight,
            self.mlp[0].weight,
            self.mlp[0].bias,
            self.mlp[2].weight,
            self.mlp[2].bias,
        )
        modulation = self.adaLN_modulation(c).unflatten(-1, (6, x.shape[-1]))[None]
        rotary = None if rotary is None else Rotary(*rotary)
        options = {"num_heads": self.num_heads, "key_mask": key_mask, "compute_dtype": modulation.dtype}
        return looped_blocks(x, [weights], modulation, 1, rotary=rotary, **options)


class OutputLayer(nn.Module):
    """Logits [B, L, V] of the residual stream x [B, L, D] fp32, for c [1 or B, cond_dim]."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).unflatten(-1, (2, x.shape[-1]))
        head = Head(self.norm_final.weight, self.linear.weight, self.linear.bias, modulation)
        return head_logits(x, head, compute_dtype=modulation.dtype)
