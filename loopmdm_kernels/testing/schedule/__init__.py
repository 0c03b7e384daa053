"""Instruction tables without a GPU: `check` proves that no interleaving of their instructions races or
deadlocks, `interpret` and `interpret_backward` run them on the CPU in any legal order.
"""

from loopmdm_kernels.testing.schedule.check import ScheduleError, check
from loopmdm_kernels.testing.schedule.interpret import interpret
from loopmdm_kernels.testing.schedule.interpret_backward import interpret_backward
from loopmdm_kernels.testing.schedule.order import positions

__all__ = ["ScheduleError", "check", "interpret", "interpret_backward", "positions"]
