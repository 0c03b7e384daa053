"""What a figure was computed with, and how much of it: the same facts beside every figure that is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from loopmdm.model.flops import DEFAULT_CONVENTION, SamplingLedger

_PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Cost:
    """What stands beside a figure of a likelihood, of samples or of puzzles."""

    precision: str  # of the network's products
    plan: str  # S of every step such as S8, or a plan
    steps: float  # denoising steps, or how often a likelihood reads a text, the mean over texts
    network_calls: int  # forward passes, each sequence of a batch counted
    tokens_per_forward: float  # tokens written, or scored, a forward pass
    gflop_per_token: float  # executed, over the same tokens
    flop_convention: str
    seeds: dict[str, int]  # of what is drawn, by what it is

    @classmethod
    def of(
        cls,
        ledger: SamplingLedger,
        tokens: int,
        *,
        precision: torch.dtype,
        plan: Any,
        steps: float,
        seeds: Mapping[str, int],
    ) -> Cost:
        """The facts of a run that `ledger` counted, over the tokens that it wrote or scored."""
        return cls(
            precision=_PRECISIONS.get(precision, str(precision)),
            plan=str(plan),
            steps=steps,
            network_calls=ledger.sequence_calls,
            tokens_per_forward=tokens / max(1, ledger.sequence_calls),
            gflop_per_token=ledger.flops() / 1e9 / max(1, tokens),
            flop_convention=DEFAULT_CONVENTION,
            seeds=dict(seeds),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        return cost_line(self.to_dict())


def cost_line(cost: Mapping[str, Any]) -> str:
    """A line of what `Cost.to_dict` returned, for a reader."""
    drawn = [f"{what} {seed}" for what, seed in cost["seeds"].items()]
    seeds = f"seeds: {', '.join(drawn)}" if drawn else "nothing drawn"
    return (
        f"{cost['plan']}: {cost['precision']}, steps {cost['steps']:g},"
        f" network calls {cost['network_calls']:,}, tokens/forward {cost['tokens_per_forward']:.3g},"
        f" GFLOP/token {cost['gflop_per_token']:.3g} ({cost['flop_convention']}), {seeds}"
    )
