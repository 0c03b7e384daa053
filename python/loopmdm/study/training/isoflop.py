"""Train a plain, a deeper plain and a looped model on the same training FLOPs, and compare them.

base: the model without its loop. deep: a plain model whose training step costs what the looped one's costs
on average (5 layers for 3 with one looped and S to 6), so both total and per-step FLOPs are equal. loop: the
looped model. A looped step costs more, so the looped and the deep model take fewer steps. What a step costs
relative to the model without its loop is in the table under three conventions. --arms chooses among them; an
arm that `loopmdm train` has made may be put into `arms/` of the folder, under its name and seed (loop-seed0).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.loop_law import LoopLaw
from loopmdm.study.kit.figures import select
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.training import comparison
from loopmdm.study.training.arms import Arm, iso_flop_arms
from loopmdm.study.training.comparison import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "train plain, deeper and looped models on equal FLOPs and compare them"
EPILOG = """examples:
  loopmdm study isoflop --out isoflop               6x6 Sudoku, three arms of about 4 minutes on one core
  loopmdm study isoflop --preset text --data stdlib --flops 1e13 --out isoflop-text
"""
DEFAULT_FLOPS = 1.5e13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    comparison.add_arguments(parser, default_flops=DEFAULT_FLOPS)


def run(args: argparse.Namespace, folder: StudyFolder) -> list[Row]:
    rows = comparison.run(args, folder, _arms)
    for seed in args.seeds:
        for order in dict.fromkeys(row["order"] for row in rows):
            _find(folder, select(rows, seed=seed, order=order), f"seed {seed}, {order.replace('_', ' ')}")
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    return comparison.draw(rows, "Models of equal training cost")


def _arms(config: LoopMDMConfig, law: LoopLaw) -> list[Arm]:
    return iso_flop_arms(config, law.mean)


def _find(folder: StudyFolder, rows: list[Row], where: str) -> None:
    """L3 and L4 for Sudoku in left-to-right order; elsewhere the same figures, without a verdict."""
    looped = select(rows, arm="loop")
    if not looped:
        return
    trained = [row for row in looped if row["num_loops"] <= row["max_loops"]] or looped
    full = max(trained, key=lambda row: int(row["num_loops"]))
    others = [("L3", one, 0.2) for one in select(rows, arm="base")]
    others += [("L4", one, 0.1) for one in select(rows, arm="deep")]
    for name, other, points in others:
        at, compared = f"loop {full['value']:.3f} at S = {full['num_loops']}", other["arm"]
        outcome = f"{where}: {at}, {compared} {other['value']:.3f}"
        if full["order"] == "left_to_right":
            condition = f"loop solves at least {100 * points:.0f} points more boards than {compared}"
            folder.find(name, condition, outcome, full["value"] >= other["value"] + points)
        else:
            condition = f"loop against {compared}, reported only"
            folder.find(name, condition, outcome, None)
