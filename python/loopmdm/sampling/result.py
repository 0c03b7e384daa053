"""What sampling hands back, at the end and step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from loopmdm.model.flops import SamplingLedger
from loopmdm.plan import ComputePlan


class StepEvent(NamedTuple):
    """The R positions that one step changed, ordered by sequence, then position. Tensors are [R], on the CPU.

    A token that is the mask token was masked again (remasking); its confidence is 0.
    """

    step: int
    sequence: Tensor  # int64, row of the result
    positions: Tensor  # int64
    tokens: Tensor  # int64
    confidence: Tensor  # probability the model gave the token, at temperature 1
    loops: Tensor  # int64, loops spent on the token's sequence in this step; 0 where it was not computed


@dataclass
class SampleResult:
    """Samples, and what they cost.

    Tensors are on the model's device. `history` holds one event for every step that revealed something, or is
    None when it was not asked for. `ledger` counts executed FLOPs under each convention.
    """

    tokens: Tensor  # [B, L] int64; -1 behind the end of a sequence shorter than L
    lengths: Tensor  # [B] int64, tokens of each sequence: its length, or up to its end-of-sequence token
    network_calls: Tensor  # [B] int64, forward passes each sequence took part in
    loops: Tensor  # [B] int64, loops summed over these passes
    rows_projected: int  # rows that went through the vocabulary projection
    num_steps: int  # denoising steps taken
    exact: bool  # the samples follow the model's reverse process, of T steps or in continuous time
    plan: ComputePlan
    seconds: float
    ledger: SamplingLedger
    history: list[StepEvent] | None = None
    backends: dict[str, dict[str, str]] = field(default_factory=dict)  # of each op, and why

    @property
    def total_network_calls(self) -> int:
        """Network calls summed over the sequences."""
        return int(self.network_calls.sum())
