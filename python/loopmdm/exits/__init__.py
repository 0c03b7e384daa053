"""When a sequence may stop looping: rules that look at its state after each loop.

Sequences that stop leave the batch between loops.
"""

from __future__ import annotations

from loopmdm.exits.loop import loop_to_threshold
from loopmdm.exits.rules import (
    ArgmaxStable,
    ExitCost,
    ExitGate,
    ExitRule,
    HiddenChange,
    OutputChange,
    make_rule,
)

__all__ = [
    "ArgmaxStable",
    "ExitCost",
    "ExitGate",
    "ExitRule",
    "HiddenChange",
    "OutputChange",
    "loop_to_threshold",
    "make_rule",
]
