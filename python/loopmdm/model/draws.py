"""What a training step draws, as operators: a compiled graph draws what an eager call draws."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm.model import diffusion
from loopmdm.model.loop_law import LoopLaw
from loopmdm_kernels.ops.library import register
from loopmdm_kernels.tracing import traced


def loops(like: Tensor, max_loops: int, seed: int | None = None) -> int | Tensor:
    """S from U{1..max_loops}; in a traced call, which cannot wait for a number, int64 [1] on the CPU.

    seed: makes S a function of it; None: torch's global generator.
    """
    if traced(like):
        drawn: Tensor = torch.ops.loopmdm.draw_loops(like, max_loops, seed)
        return drawn
    return int(_loops(like, max_loops, seed))


def dropout_seed(like: Tensor, limit: int = 2**31) -> int | Tensor:
    """A number below `limit` from torch's global generator; int64 [1] on the CPU in a traced call."""
    if traced(like):
        drawn: Tensor = torch.ops.loopmdm.draw_below(like, limit)
        return drawn
    return int(_below(like, limit))


def corruption(
    frozen: Tensor, t: Tensor | None, dropout: bool, seed: int | None = None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Times [B] on the CPU, masks bool [B, L] and a seed for dropout (0 without `dropout`) of one batch.

    Args:
        frozen: [B, L] bool, positions that are never masked.
        t: [B] times; None: they are drawn.
        dropout: whether a seed for dropout is drawn; in a traced call it is int64 [1] on the CPU.
        seed: makes all a function of it; None: torch's global generator.
    """
    if traced(frozen):
        times, masked, drawn = torch.ops.loopmdm.draw_corruption(frozen, t, dropout, seed)
        return times, masked, drawn if dropout else 0
    times, masked, drawn = _corruption(frozen, t, dropout, seed)
    return times, masked, int(drawn)


def _below(like: Tensor, limit: int) -> Tensor:
    return torch.randint(limit, (1,))


def _loops(like: Tensor, max_loops: int, seed: int | None) -> Tensor:
    if seed is None:
        return torch.randint(1, max_loops + 1, (1,))
    return torch.tensor([LoopLaw.uniform(max_loops).sample(seed, 0)])


def _corruption(
    frozen: Tensor, t: Tensor | None, dropout: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    times = diffusion.sample_t(frozen.shape[0], generator) if t is None else t.cpu().clone()
    masked = diffusion.draw_mask(times, frozen, generator)
    drawn = torch.randint(2**31, (1,), generator=generator) if dropout else torch.zeros(1, dtype=torch.int64)
    return times, masked, drawn


def _fake_corruption(frozen: Tensor, t: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    times = frozen.new_empty(frozen.shape[0], dtype=torch.float32 if t is None else t.dtype, device="cpu")
    return times, torch.empty_like(frozen), frozen.new_empty(1, dtype=torch.int64, device="cpu")


register(
    "draw_below(Tensor like, int limit) -> Tensor",
    _below,
    lambda like, *_: like.new_empty(1, dtype=torch.int64, device="cpu"),
    random=True,
)
register(
    "draw_loops(Tensor like, int max_loops, SymInt? seed) -> Tensor",
    _loops,
    lambda like, *_: like.new_empty(1, dtype=torch.int64, device="cpu"),
    random=True,
)
register(
    "draw_corruption(Tensor frozen, Tensor? t, bool dropout, SymInt? seed) -> (Tensor, Tensor, Tensor)",
    _corruption,
    _fake_corruption,
    random=True,
)
