"""A stack of adaLN transformer blocks applied S times with the same weights (LoopMDM, H(k) = mid(H(k-1))).

The residual stream x stays in fp32 (or float64). Everything marked `to(dtype)` is a rounding point of
the reference model under bf16 autocast: the modulation, its `1 + scale`, the input and output of each
linear, the rotated q and k, the gated branch before it is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopmdm_kernels.reference.attention import attention
from loopmdm_kernels.reference.philox import dropout_keep
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Rotary

NORM_EPS = 1e-5


def norm_modulate(x: Tensor, norm: Tensor | None, shift: Tensor, scale: Tensor) -> Tensor:
    """layer_norm(x) * norm * (1 + scale) + shift in x's dtype; `1 + scale` is rounded in scale's dtype.

    Without norm: x * (1 + scale) + shift.
    """
    if norm is None:
        return x * (1 + scale).to(x.dtype) + shift.to(x.dtype)
    normalized = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * norm.to(x.dtype)
    return normalized * (1 + scale).to(x.dtype) + shift.to(x.dtype)


def _dropout(branch: Tensor, rate: float, seed: int, application: int, index: int) -> Tensor:
    if rate == 0.0:
        return branch
    keep = dropout_keep(seed, application, index, branch.shape, rate, branch.device)
    return torch.where(keep, branch / (1.0 - rate), torch.zeros_like(branch))


def block(
    x: Tensor,
    weights: BlockWeights,
    modulation: Tensor,
    *,
    num_heads: int,
    rotary: Rotary | None,
    key_mask: Tensor | None,
    dtype: torch.dtype,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    application: int = 0,
) -> Tensor:
    """One block. x [B, L, D]; modulation [1 or B, 6, D] = shift, scale, gate of attention, then MLP."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.to(dtype)[:, :, None, :].unbind(1)
    batch, length, hidden = x.shape

    h = norm_modulate(x, weights.norm1, shift1, scale1).to(dtype)
    qkv = F.linear(h, weights.qkv.to(dtype))
    q, k, v = qkv.view(batch, length, 3, num_heads, hidden // num_heads).permute(2, 0, 3, 1, 4)
    mixed = attention(q, k, v, key_mask=key_mask, rotary=rotary)
    mixed = mixed.transpose(1, 2).reshape(batch, length, hidden)
    branch = F.linear(mixed, weights.attn_out.to(dtype))
    x = x + gate1 * _dropout(branch, dropout, dropout_seed, application, index=0)

    h = norm_modulate(x, weights.norm2, shift2, scale2).to(dtype)
    h = F.gelu(F.linear(h, weights.mlp_in.to(dtype), weights.mlp_in_bias.to(dtype)), approximate="tanh")
    branch = F.linear(h, weights.mlp_out.to(dtype), weights.mlp_out_bias.to(dtype))
    x = x + gate2 * _dropout(branch, dropout, dropout_seed, application, index=1)
    return x


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Frobenius norm of new - old over that of new, per sequence: [B]."""
    change, size = ((t.flatten(1).square().sum(dim=1)).sqrt() for t in (new - old, new))
    return change / size


def looped_blocks(
    x: Tensor,
    blocks: Sequence[BlockWeights | Fp8BlockWeights],
    modulation: Tensor,
    num_loops: int | Tensor,
    *,
    num_heads: int,
    max_loops: int | None = None,
    rotary: Rotary | None = None,
    key_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    exit_threshold: float | None = None,
    recompute: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = compute_dtype or blocks[0].qkv.dtype
    # Cast once, not once a loop: the casts are identities where the weights already have the dtype.
    plain = [b.dequantized(dtype) if isinstance(b, Fp8BlockWeights) else b for b in blocks]
    cast = [
        BlockWeights(*(w if w.ndim == 1 and i in (0, 3) else w.to(dtype) for i, w in enumerate(b)))
        for b in plain
    ]
    modulation = modulation.to(dtype)

    def one_loop(state: Tensor, mod: Tensor, mask: Tensor | None, loop: int) -> Tensor:
        for index, weights in enumerate(cast):
            state = block(
                state,
                weights,
                mod[index],
                num_heads=num_heads,
                rotary=rotary,
                key_mask=mask,
                dtype=dtype,
                dropout=dropout,
                dropout_seed=dropout_seed,
                application=loop * len(cast) + index,
            )
        return state

    def apply(state: Tensor, mod: Tensor, mask: Tensor | None, loop: int) -> Tensor:
        if recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(
                one_loop, state, mod, mask, loop, use_reentrant=False, preserve_rng_state=False
            )
            return result
        return one_loop(state, mod, mask, loop)

    if isinstance(num_loops, int) and exit_threshold is None:
        for loop in range(num_loops):
            x = apply(x, modulation, key_mask, loop)
        return x

    # Sequences end at different loops: those that are done leave the batch.
    batch = x.shape[0]
    limit = torch.full((batch,), num_loops, device=x.device) if isinstance(num_loops, int) else num_loops
    used = torch.zeros(batch, dtype=torch.int64, device=x.device)
    loop = 0
    active = torch.arange(batch, device=x.device)
    while active.numel():
        mod = modulation if modulation.shape[1] == 1 else modulation[:, active]
        old = x[active]
        new = apply(old, mod, None if key_mask is None else key_mask[active], loop)
        x = x.index_copy(0, active, new)
        loop += 1
        used[active] = loop
        going = limit[active] > loop
        if exit_threshold is not None:
            going &= ~(relative_change(new.detach(), old.detach()) < exit_threshold)
        active = active[going]
    return x if exit_threshold is None else (x, used)
