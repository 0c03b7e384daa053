"""`looped_blocks` on the CPU: float32 or bfloat16 products, float32 sums and residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels.cpu.packing import packed_linear
from loopmdm_kernels.types import BlockWeights, Rotary


def supports(**_: object) -> str | None:
    return None


def looped_blocks(
    x: Tensor,
    blocks: Sequence[BlockWeights],
    modulation: Tensor,
    num_loops: int | Tensor,
    *,
    num_heads: int,
    rotary: Rotary | None = None,
    key_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    exit_threshold: float | None = None,
    recompute: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    from loopmdm_kernels import _C

    dtype = compute_dtype or blocks[0].qkv.dtype
    narrow = dtype == torch.bfloat16
    batch = x.shape[0]
    loops = torch.full((batch,), num_loops) if isinstance(num_loops, int) else num_loops.contiguous()
    tensors: list[Tensor] = []
    for b in blocks:
        tensors += [
            b.norm1.detach().float().contiguous(),
            packed_linear(b.qkv, narrow=narrow, heads=num_heads, parts=3),
            packed_linear(b.attn_out, narrow=narrow),
            b.norm2.detach().float().contiguous(),
            packed_linear(b.mlp_in, narrow=narrow),
            b.mlp_in_bias.detach().float().contiguous(),
            packed_linear(b.mlp_out, narrow=narrow),
            b.mlp_out_bias.detach().float().contiguous(),
        ]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    used = torch.empty(batch, dtype=torch.int64)
    cos, sin = (None, None) if rotary is None else (a.detach().float().contiguous() for a in rotary)
    _C.looped_blocks(
        x.detach().contiguous(),
        tensors,
        modulation.detach().float().contiguous(),
        loops,
        num_heads,
        cos,
        sin,
        None if key_mask is None else key_mask.contiguous(),
        narrow,
        dropout,
        dropout_seed,
        -1.0 if exit_threshold is None else exit_threshold,
        torch.get_num_threads(),
        out,
        used,
    )
    return out if exit_threshold is None else (out, used)
