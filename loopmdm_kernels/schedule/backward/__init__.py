"""The backward pass of the looped block as a table of instructions."""

from loopmdm_kernels.schedule.backward.check import check_backward
from loopmdm_kernels.schedule.backward.cost import BackwardPlan, choose_backward
from loopmdm_kernels.schedule.backward.interpret import interpret_backward
from loopmdm_kernels.schedule.backward.sums import RowSums, WeightSums, finish
from loopmdm_kernels.schedule.backward.table import (
    BackwardPhase,
    BackwardTable,
    BackwardTiles,
    build_backward,
)

__all__ = [
    "BackwardPhase",
    "BackwardPlan",
    "BackwardTable",
    "BackwardTiles",
    "RowSums",
    "WeightSums",
    "build_backward",
    "check_backward",
    "choose_backward",
    "finish",
    "interpret_backward",
]
