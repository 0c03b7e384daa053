"""The looped block as a table of instructions: what the persistent GPU kernels execute, as data.

Each pass is a list of phases: what a kind of tile waits for, reads, writes and costs. `build` and
`build_backward` make the tables of a shape; `choose` and `choose_backward` pick the tiles by a model of
the GPU's limits, which are assumed or `measured`. `loopmdm_kernels.testing.schedule` proves tables and runs
them on the CPU.
"""

from loopmdm_kernels.schedule.backward import Backward, BackwardTiles, build_backward
from loopmdm_kernels.schedule.device import Device, device_of
from loopmdm_kernels.schedule.forward import Forward, Tiles, build
from loopmdm_kernels.schedule.plan import BackwardPlan, Plan, choose, choose_backward
from loopmdm_kernels.schedule.rows import RowsPlan, choose_rows
from loopmdm_kernels.schedule.sums import RowSums, WeightSums, finish
from loopmdm_kernels.schedule.table import BlockShape, Instruction, Phase, Table

__all__ = [
    "Backward",
    "BackwardPlan",
    "BackwardTiles",
    "BlockShape",
    "Device",
    "Forward",
    "Instruction",
    "Phase",
    "Plan",
    "RowSums",
    "RowsPlan",
    "Table",
    "Tiles",
    "WeightSums",
    "build",
    "build_backward",
    "choose",
    "choose_backward",
    "choose_rows",
    "device_of",
    "finish",
]
