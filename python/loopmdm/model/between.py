"""What happens between two loops; in LoopMDM nothing does, H(k) = mid(H(k - 1)).

Damped, S loops are S parts of one step in place of S steps (training-free looping, arXiv 2605.23872):

    H(k) = H(k - 1) + (mid(H(k - 1)) - H(k - 1)) / S

One loop is that of LoopMDM, bit for bit.

A loss may read out every loop, by what stands behind the loop, and not the last alone (R-MDM, arXiv
2606.18022).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from loopmdm_kernels.values import meant

LoopLoss = Literal["last", "mean", "linear"]


def check_loop_loss(kind: str, *, damped: bool = False, backprop_loops: int = 0) -> None:
    """Raise the ValueError of a loss that is none, or that what else is asked for leaves no sense."""
    accepted = get_args(LoopLoss)
    if kind not in accepted:
        raise ValueError(
            f"loop_loss: got {kind!r}, expected one of {', '.join(accepted)}{meant(kind, accepted)}"
        )
    if kind != "last" and damped:
        raise ValueError(f"loop_loss: {kind} reads out every loop, but a damped loop is a part of one step")
    if kind != "last" and backprop_loops:
        raise ValueError(f"loop_loss: {kind} differentiates every loop; got backprop_loops {backprop_loops}")


def loop_weights(kind: str, num_loops: int) -> list[float]:
    """The weights of the losses after loop 1..S, which sum to 1: all alike (mean), or in proportion to k."""
    if kind == "mean":
        return [1 / num_loops] * num_loops
    return [2 * loop / (num_loops * (num_loops + 1)) for loop in range(1, num_loops + 1)]


def damped_step(old: Tensor, new: Tensor, num_loops: int | Tensor) -> Tensor:
    """old + (new - old) / S [B, L, D], which is `new` itself where S = 1.

    num_loops: S of all sequences, or of each, int64 [B].
    """
    if not isinstance(num_loops, Tensor):
        if num_loops == 1:
            return new
        # A tensor, since a GPU multiplies by the inverse of a number: other bits than with one S each.
        return old + (new - old) / torch.full((), num_loops, dtype=new.dtype, device=new.device)
    num_loops = num_loops[:, None, None]
    return torch.where(num_loops == 1, new, old + (new - old) / num_loops.to(new.dtype))
