"""What happens between two loops; in LoopMDM nothing does, H(k) = mid(H(k - 1)).

Damped, S loops are S parts of one step in place of S steps (training-free looping, arXiv 2605.23872):

    H(k) = H(k - 1) + (mid(H(k - 1)) - H(k - 1)) / S

One loop is that of LoopMDM, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
