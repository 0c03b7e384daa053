"""The looped block as a table of instructions: what the persistent GPU kernel executes, as data.

`build` makes the table of a shape, `check` proves that no interleaving of its instructions races or
deadlocks, `interpret` runs it on the CPU, and `choose` picks the tiles by a model of the GPU's limits, which
are assumed or `measured`.
"""

from loopmdm_kernels.schedule.build import build
from loopmdm_kernels.schedule.check import ScheduleError, check
from loopmdm_kernels.schedule.cost import Device, Plan, choose, device_of
from loopmdm_kernels.schedule.interpret import interpret
from loopmdm_kernels.schedule.table import BlockShape, Instruction, Phase, Table, Tiles

__all__ = [
    "BlockShape",
    "Device",
    "Instruction",
    "Phase",
    "Plan",
    "ScheduleError",
    "Table",
    "Tiles",
    "build",
    "check",
    "choose",
    "device_of",
    "interpret",
]
