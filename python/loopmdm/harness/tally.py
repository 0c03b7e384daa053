"""What the answers of a harness were computed with: said after each kind of request, and in its results."""

from __future__ import annotations

from typing import Any

from loopmdm.model.flops import SamplingLedger
from loopmdm.quality.cost import Cost
from loopmdm.terminal import note


class Tally:
    """What answers were computed with, by the kind of request."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._counted: dict[str, tuple[SamplingLedger, int, int]] = {}

    def add(self, kind: str, ledger: SamplingLedger, tokens: int, steps: int) -> None:
        """Count a request: the tokens it scored or wrote, and the denoising steps or readings it took."""
        total, before, taken = self._counted.get(kind, (SamplingLedger(1), 0, 0))
        total.add(ledger)
        self._counted[kind] = (total, before + tokens, taken + steps)

    def close(self, kind: str, requests: int, **facts: Any) -> None:
        """Say what `requests` of a kind cost."""
        if kind not in self._counted:
            return
        ledger, tokens, steps = self._counted[kind]
        self.costs[kind] = Cost.of(ledger, tokens, steps=steps / max(1, requests), **facts)
        note(f"{kind} of {requests} requests: {self.costs[kind].line()}")

    def to_dict(self) -> dict[str, Any]:
        return {kind: cost.to_dict() for kind, cost in self.costs.items()}
