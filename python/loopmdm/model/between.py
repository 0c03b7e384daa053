"""What happens between two loops; in LoopMDM nothing does, H(k) = mid(H(k - 1)).

With what a configuration turns on, loop k begins with X(k), where X(1) = H(0) and for k > 1

    X(k) = norm(inject(H(k - 1)) + v(k - 1))      carry_norm, inject, loop_embedding; each alone or together
    inject(H) = H + b H(0)                        add
              = exp(-d exp(a)) H + d b norm(H(0)) parcae (arXiv 2604.12946)

with vectors a, b and d = softplus(.) over the channels, v as in R-MDM (arXiv 2606.18022). In parcae less than
all of H stays in each channel, so that it cannot grow by being carried. Damped, S loops are
S parts of one step in place of S steps (training-free looping, arXiv 2605.23872):

    H(k) = X(k) + (mid(X(k)) - X(k)) / S

One loop is that of LoopMDM, bit for bit. b and v are 0 at first, so that "add" and loop embeddings change no
loop of a model that they are given to; parcae begins with 0.99 H, and the norm is one at once.

A loss may read out every loop, by what stands behind the loop, and not the last alone (R-MDM).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmdm.model.config import OFF, LoopMDMConfig
from loopmdm.model.modules import ScaleNorm
from loopmdm_kernels.tracing import without_autocast
from loopmdm_kernels.values import meant

# Of parcae: exp(a) and d at first. 0.99 of the state stays, and b moves fast enough to be learned.
_FIRST_DECAY, _FIRST_STEP = 0.1, 0.1

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


def check_compile(fields: Mapping[str, Any]) -> None:
    """Raise a ValueError where a model of these fields of a configuration cannot be trained compiled."""
    acting = [name for name, off in OFF.items() if fields.get(name, off) != off]
    if acting:
        raise ValueError(
            f"compile: what happens between loops ({', '.join(acting)}) is run loop by loop from the host;"
            " leave out one of them"
        )


def loop_weights(kind: str, num_loops: int) -> list[float]:
    """The weights of the losses after loop 1..S, which sum to 1: all alike (mean), or in proportion to k."""
    if kind == "mean":
        return [1 / num_loops] * num_loops
    return [2 * loop / (num_loops * (num_loops + 1)) for loop in range(1, num_loops + 1)]


class Between(nn.Module):
    """The weights that act between loops, of a configuration that `learns_between_loops`."""

    def __init__(self, config: LoopMDMConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.inject = config.inject
        if config.inject != "none":
            self.gain = nn.Parameter(torch.zeros(hidden))
        if config.inject == "parcae":
            self.log_decay = nn.Parameter(torch.full((hidden,), math.log(_FIRST_DECAY)))
            self.step = nn.Parameter(torch.full((hidden,), math.log(math.expm1(_FIRST_STEP))))
        if config.loop_embedding:
            self.embedding = nn.Parameter(torch.zeros(config.loop_embedding, hidden))
        if config.carry_norm:
            self.norm = ScaleNorm(hidden)

    def forward(self, state: Tensor, first: Tensor | None, loop: int) -> Tensor:
        """X(loop + 1) from H(loop) = state, both [B, L, D]; loop is at least 1.

        first: H(0), which is read where something is injected.
        """
        with without_autocast(state.device):
            if self.inject == "add":
                assert first is not None
                state = state + self.gain.to(state.dtype) * first
            elif self.inject == "parcae":
                assert first is not None
                step = F.softplus(self.step.to(state.dtype))
                kept = torch.exp(-step * self.log_decay.to(state.dtype).exp())
                state = kept * state + step * self.gain.to(state.dtype) * F.layer_norm(
                    first, first.shape[-1:]
                )
            if (embedding := getattr(self, "embedding", None)) is not None:
                state = state + embedding[min(loop, len(embedding)) - 1].to(state.dtype)
            if (norm := getattr(self, "norm", None)) is not None:
                state = norm(state)
            return state


def between_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `Between` among those of a model, by their names there."""
    return {name: tensor for name, tensor in state.items() if name.startswith("between.")}


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
