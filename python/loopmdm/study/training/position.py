"""Train models that loop different layers, on the same training FLOPs: which ones are worth it?

early: the first layers; early-middle: those after the first, as in LoopMDM; middle; late: the last ones, each
as many as the model loops; all: every layer, at a larger cost per step and so for fewer steps. The arms
differ in nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.loop_law import LoopLaw
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.training import comparison
from loopmdm.study.training.arms import Arm, position_arms
from loopmdm.study.training.comparison import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "train models that loop early, middle, late or all layers on equal FLOPs"
EPILOG = """examples:
  loopmdm study position --layers 5 --out position   6x6 Sudoku, five arms of about 4 minutes on one core
  loopmdm study position --preset text --data stdlib --flops 1e13 --out position-text
"""
DEFAULT_FLOPS = 1.4e13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    comparison.add_arguments(parser, default_flops=DEFAULT_FLOPS)


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    return comparison.run(args, folder, _arms)


def draw(rows: Sequence[Row]) -> Figure:
    return comparison.draw(rows, "Position of the looped layers")


def _arms(config: LoopMDMConfig, law: LoopLaw) -> list[Arm]:
    return position_arms(config)
