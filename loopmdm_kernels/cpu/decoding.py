"""Whole denoising steps on the CPU: network calls and the choice of what is revealed, in compiled code.

The network is given as the calls of the ops that it consists of. Their kernels do the work, so that its bits
are those of the ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels import backends
from loopmdm_kernels.calls import LoopedCall, SampleCall
from loopmdm_kernels.cpu.head import head_operands
from loopmdm_kernels.cpu.looped_blocks import packed_blocks
from loopmdm_kernels.cpu.operands import DTYPES, vector
from loopmdm_kernels.cpu.sample_rows import reads_bytes, token_operands
from loopmdm_kernels.types import RevealRule

_ANY_WINDOW = 2**62


class NetworkParts(NamedTuple):
    """A network, and how tokens are drawn from its predictions."""

    embedding: Tensor  # [V, D] float32 or bfloat16
    positions: Tensor | None  # [most L, D] in its dtype, added to it
    stacks: Sequence[LoopedCall | None]  # of one state x: before, in and after the loop; None: no blocks
    draw: SampleCall  # from a hidden state [1, 1, D], of any rows

    def why_not(self) -> str | None:
        """Why the compiled steps cannot compute it, or None."""
        calls = [("looped_blocks", call) for call in self.stacks if call is not None]
        for op, call in (*calls, ("sample_rows", self.draw)):
            if backends.choose(op, call) is not backends.kernel("cpu", op):
                return f"another backend does {op}"
        if self.embedding.dtype not in DTYPES:
            return f"embedding must be float32 or bfloat16, got {self.embedding.dtype}"
        if self.draw.draw.restricted:
            return "top_p and top_k need the logits of a row together"
        return None


class Slots(NamedTuple):
    """The N positions to fill, by sequence, then by position; int64 [N]."""

    sequence: Tensor
    position: Tensor
    sequence_id: Tensor  # names the random numbers
    block: Tensor  # blocks of a sequence are filled one after the other


class Computes(NamedTuple):
    """What the network runs in each of T steps."""

    num_loops: Tensor  # [T] int64, at most
    min_loops: Tensor  # [T] int64
    exit_threshold: Tensor  # [T] float64, of `looped_blocks`; below 0: none


class State(NamedTuple):
    """What steps change, in place."""

    tokens: Tensor  # [B, L] int64
    masked: Tensor  # [N] bool
    network_calls: Tensor  # [B] int64
    loops: Tensor  # [B] int64


class Reveals(NamedTuple):
    """R slots that were revealed, in order."""

    slot: Tensor  # [R] int64
    step: Tensor  # [R] int64
    loops: Tensor  # [R] int64, of the slot's sequence in the step
    log_prob: Tensor  # [R] float32, of the token

    def part(self, first: int, last: int) -> Reveals:
        slot, step, loops, log_prob = self
        return Reveals(slot[first:last], step[first:last], loops[first:last], log_prob[first:last])


class Taken(NamedTuple):
    """What some steps did."""

    steps: int  # those that changed nothing too
    calls: int  # of the network
    sequences: int  # in these calls
    loops: int  # of these sequences
    rows: int  # drawn
    not_finite: int  # a slot whose prediction is NaN or infinite, which ended the steps; -1: none
    reveals: Reveals


class Steps:
    """The steps of a run. Weights are packed and checked once: none may change while they are taken.

    Where the draw leaves out statistics, the rule may not rate predictions, and the log-probabilities of
    what is revealed are 0 or NaN.
    """

    def __init__(
        self,
        network: NetworkParts,
        slots: Slots,
        rule: RevealRule,
        computes: Computes,
        state: State,
        max_batch: int,
    ) -> None:
        from loopmdm_kernels import _C

        draw = network.draw.draw
        alone = not draw.statistics and reads_bytes(network.draw)
        operands, quantized = (
            token_operands(network.draw) if alone else (head_operands(network.draw, network.draw.rows), None)
        )
        before, loop, after = network.stacks
        assert loop is not None
        calls = [call for call in network.stacks if call is not None]
        cos, sin = (None, None) if loop.rotary is None else map(vector, loop.rotary)
        prepared = _C.PreparedNetwork(
            network.embedding.detach(),
            None if network.positions is None else network.positions.detach(),
            tuple(tensor for call in calls for tensor in packed_blocks(call)),
            vector(torch.cat([call.modulation for call in calls])),
            0 if before is None else len(before.blocks),
            0 if after is None else len(after.blocks),
            loop.num_heads,
            cos,
            sin,
            operands,
            network.draw.head.excluded_token,
            quantized,
        )
        size = len(slots.sequence)
        slot, step, loops = torch.empty(3, size, dtype=torch.int64)
        self._reveals = Reveals(slot, step, loops, torch.empty(size, dtype=torch.float32))
        self._count = 0
        self._run = _C.DecodingRun(
            prepared,
            tuple(slots),
            rule.schedule,
            rule.place,
            (
                rule.rating,
                rule.score,
                rule.threshold,
                math.inf if rule.entropy_bound is None else rule.entropy_bound,
                _ANY_WINDOW if rule.window is None else rule.window,
            ),
            tuple(computes),
            max_batch,
            draw.rng.seed,
            draw.temperature,
            (*state, *self._reveals),
        )

    def take(self, first: int, most: int, milliseconds: float) -> Taken:
        """Take steps from `first` on until nothing is masked or `most` are taken.

        Fewer once the time is over; one at least, where something is masked.
        """
        counts = self._run.take_steps(first, most, milliseconds, torch.get_num_threads())
        steps, revealed, calls, sequences, loops, rows, not_finite = counts
        before, self._count = self._count, self._count + revealed
        return Taken(
            steps, calls, sequences, loops, rows, not_finite, self._reveals.part(before, self._count)
        )
