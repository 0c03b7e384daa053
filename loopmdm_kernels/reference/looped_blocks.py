"""A stack of adaLN transformer blocks applied S times with the same weights (LoopMDM, H(k) = mid(H(k-1))).

The residual stream x stays in fp32 (or float64). Everything marked `to(dtype)` is a rounding point of
the reference model under bf16 autocast: the modulation, its `1 + scale`, the input and output of each
linear, the rotated q and k, the gated branch before it is added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.philox import dropout_keep
from loopmdm_kernels.reference.attention import attention
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Rotary

NORM_EPS = 1e-5


class BlockParts(NamedTuple):
    """What a block calls, by the reference model's names: its modules, or functions of its weights."""

    norm1: Callable[[Tensor], Tensor]  # layer norm with its scale, in the dtype of the residual stream
    attn_qkv: Callable[[Tensor], Tensor]
    attn_out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


class Dropout(NamedTuple):
    """The masks of one application of a block."""

    rate: float = 0.0
    seed: int = 0
    application: int = 0

    def __call__(self, branch: Tensor, index: int) -> Tensor:
        """branch [B, L, D]: the block's first (attention) or second (MLP)."""
        if self.rate == 0.0:
            return branch
        keep = dropout_keep(self.seed, self.application, index, branch.shape, self.rate, branch.device)
        return torch.where(keep, branch / (1.0 - self.rate), torch.zeros_like(branch))


def layer_norm(x: Tensor, norm: Tensor) -> Tensor:
    """Over the last dimension, without bias, times the scale `norm` [D], in x's dtype."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * norm.to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift in x's dtype; `1 + scale` is rounded in scale's dtype."""
    return x * (1 + scale).to(x.dtype) + shift.to(x.dtype)


def norm_modulate(x: Tensor, norm: Tensor | None, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` of the layer norm, or of x itself without `norm`."""
    return modulate(x if norm is None else layer_norm(x, norm), shift, scale)


def apply_block(
    x: Tensor,
    parts: BlockParts,
    modulation: Tensor,
    num_heads: int,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    dropout: Dropout,
) -> Tensor:
    """One block. x [B, L, D]; modulation [1 or B, 6, D] = shift, scale, gate of attention, then MLP.

    Operands of products are rounded to the dtype of `modulation`.
    """
    dtype = modulation.dtype
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, :, None, :].unbind(1)
    batch, length, hidden = x.shape

    qkv = parts.attn_qkv(modulate(parts.norm1(x), shift1, scale1).to(dtype)).to(dtype)
    q, k, v = qkv.view(batch, length, 3, num_heads, hidden // num_heads).permute(2, 0, 3, 1, 4)
    mixed = attend(q, k, v).transpose(1, 2).reshape(batch, length, hidden)
    x = x + gate1 * dropout(parts.attn_out(mixed).to(dtype), 0)

    branch = parts.mlp(modulate(parts.norm2(x), shift2, scale2).to(dtype)).to(dtype)
    return x + gate2 * dropout(branch, 1)


def _parts(weights: BlockWeights, dtype: torch.dtype) -> BlockParts:
    def mlp(h: Tensor) -> Tensor:
        h = F.linear(h, weights.mlp_in.to(dtype), weights.mlp_in_bias.to(dtype))
        return F.linear(
            F.gelu(h, approximate="tanh"), weights.mlp_out.to(dtype), weights.mlp_out_bias.to(dtype)
        )

    return BlockParts(
        norm1=lambda x: layer_norm(x, weights.norm1),
        attn_qkv=lambda h: F.linear(h, weights.qkv.to(dtype)),
        attn_out=lambda h: F.linear(h, weights.attn_out.to(dtype)),
        norm2=lambda x: layer_norm(x, weights.norm2),
        mlp=mlp,
    )


def block(
    x: Tensor,
    weights: BlockWeights,
    modulation: Tensor,
    *,
    num_heads: int,
    rotary: Rotary | None,
    key_mask: Tensor | None,
    dropout: Dropout,
) -> Tensor:
    """One block of plain weights. x [B, L, D]; modulation [1 or B, 6, D], in the dtype of the products."""
    attend = partial(attention, key_mask=key_mask, rotary=rotary)
    return apply_block(x, _parts(weights, modulation.dtype), modulation, num_heads, attend, dropout)


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Frobenius norm of new - old over that of new, per sequence: [B]."""
    change, size = ((t.flatten(1).square().sum(dim=1)).sqrt() for t in (new - old, new))
    return change / size


def run(call: LoopedCall) -> tuple[Tensor, Tensor | None]:
    dtype = call.dtype
    # Cast once, not once a loop: the casts are identities where the weights already have the dtype.
    plain = [b.dequantized(dtype) if isinstance(b, Fp8BlockWeights) else b for b in call.blocks]
    cast = [
        BlockWeights(*(w if w.ndim == 1 and i in (0, 3) else w.to(dtype) for i, w in enumerate(b)))
        for b in plain
    ]
    modulation = call.modulation.to(dtype)

    def one_loop(state: Tensor, active: Tensor | None, loop: int) -> Tensor:
        mod = modulation if active is None or modulation.shape[1] == 1 else modulation[:, active]
        mask = call.key_mask if active is None or call.key_mask is None else call.key_mask[active]
        for index, weights in enumerate(cast):
            dropout = Dropout(call.dropout, int(call.dropout_seed), loop * len(cast) + index)
            state = block(
                state,
                weights,
                mod[index],
                num_heads=call.num_heads,
                rotary=call.rotary,
                key_mask=mask,
                dropout=dropout,
            )
        return state

    return run_loops(one_loop, call.x, call.num_loops, call.exit_threshold, recompute=call.recompute)


def run_loops(
    one_loop: Callable[[Tensor, Tensor | None, int], Tensor],
    x: Tensor,
    num_loops: int | Tensor,
    exit_threshold: float | None,
    *,
    recompute: bool,
    preserve_rng_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """H(S) from H(0) = x [B, L, D], and the loops of each sequence; None: `num_loops` for all of them.

    one_loop(state, active, loop) is H(loop + 1) from H(loop) of the sequences `active`, int64 [b]; None: of
    all. With `recompute` its inputs are kept for the backward pass, and torch's random state if asked for.
    """

    def apply(state: Tensor, active: Tensor | None, loop: int) -> Tensor:
        if recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(
                one_loop, state, active, loop, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )
            return result
        return one_loop(state, active, loop)

    if isinstance(num_loops, int) and exit_threshold is None:
        for loop in range(num_loops):
            x = apply(x, None, loop)
        return x, None

    # Sequences end at different loops: those that are done leave the batch.
    batch = x.shape[0]
    limit = torch.full((batch,), num_loops, device=x.device) if isinstance(num_loops, int) else num_loops
    used = torch.zeros(batch, dtype=torch.int64, device=x.device)
    loop = 0
    active = torch.arange(batch, device=x.device)
    while active.numel():
        old = x[active]
        new = apply(old, active, loop)
        x = x.index_copy(0, active, new)
        loop += 1
        used[active] = loop
        going = limit[active] > loop
        if exit_threshold is not None:
            going &= ~(relative_change(new.detach(), old.detach()) < exit_threshold)
        active = active[going]
    return x, used
