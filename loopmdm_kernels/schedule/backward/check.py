"""Proves the table of the backward pass as schedule/check.py does that of the forward pass.

Step j + 1 is step j with its targets shifted, and no wait reaches over more than one step, so three steps
contain every case. A step that a sequence does not take part in has the same waits and signals.
"""

from __future__ import annotations

from collections.abc import Iterator

from loopmdm_kernels.schedule.backward.accesses import backward_accesses
from loopmdm_kernels.schedule.backward.table import BackwardPhase, BackwardTable
from loopmdm_kernels.schedule.check import Rules, Wait, prove
from loopmdm_kernels.schedule.table import Instruction

CHECKED_STEPS = 3


def check_backward(table: BackwardTable, steps: int = CHECKED_STEPS) -> None:
    """Raises ScheduleError, naming the instructions, if the table can race or deadlock."""
    initial = table.initial_counters()

    def waits(step: int, item: Instruction) -> Iterator[Wait]:
        for counter in range(item.wait, item.wait + item.wait_number):
            yield Wait(counter, item.wait_count * (step + 1) - initial[counter])

    def signals(_: int, item: Instruction) -> Iterator[tuple[int, int]]:
        if item.signal >= 0:
            yield item.signal, item.signal_count

    instances = [(step, item) for step in range(steps) for item in table.loop]
    prove(
        instances,
        Rules(waits, signals, lambda _, item: backward_accesses(table, item), BackwardPhase),
    )
