"""The shipped checkpoints do what the README says, on puzzles that no training could see."""

import json
from importlib.resources import files

import numpy as np
import pytest

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.data import sudoku
from loopmdm.data.sudoku import in_test_split
from loopmdm.runs.recipes import SUDOKU_RECIPES
from loopmdm.solve import solve_puzzles
from loopmdm.train.config import TrainConfig
from loopmdm.train.metrics import read_metrics

FOLDER = files("loopmdm") / "checkpoints"
NAMES = {"sudoku": "sudoku9", "sudoku6": "sudoku6"}


def solved(model, puzzles, spec, num_loops, order) -> float:
    return float(solve_puzzles(model, puzzles.clues, spec, num_loops=num_loops, order=order).accuracy)


def test_l10_more_loops_solve_more_6x6_puzzles_left_to_right():
    model = LoopMDM.from_pretrained(str(FOLDER / "sudoku6"))
    puzzles = sudoku.generate(sudoku.SIX, 300, seed=77, clues=None, split="test")
    assert bool(in_test_split(puzzles.ids).all())
    once, full, beyond = (solved(model, puzzles, sudoku.SIX, s, "left_to_right") for s in (1, 6, 12))
    assert full >= once + 0.30
    assert beyond >= full - 0.05  # more loops than training ever used
    assert solved(model, puzzles, sudoku.SIX, 6, "confidence") > 0.9


def test_9x9_checkpoint():
    model = LoopMDM.from_pretrained(str(FOLDER / "sudoku9"))
    puzzles = sudoku.generate(sudoku.NINE, 60, seed=78, clues=(30, 40), split="test")
    full = solved(model, puzzles, sudoku.NINE, 8, "left_to_right")
    assert full >= solved(model, puzzles, sudoku.NINE, 1, "left_to_right") + 0.2
    # 0.97 on many puzzles; 0.85 is four standard errors below on sixty.
    assert solved(model, puzzles, sudoku.NINE, 4, "confidence") >= 0.85


@pytest.mark.parametrize("preset", NAMES)
def test_log_configuration_and_recipe_agree(preset):
    folder = FOLDER / NAMES[preset]
    recipe = SUDOKU_RECIPES[preset]
    assert LoopMDM.from_pretrained(str(folder)).config == LoopMDMConfig.preset(preset)
    trained = TrainConfig.from_dict(json.loads((folder / "train_config.json").read_text()))
    assert trained.differences(recipe.training) == {} and trained.steps == recipe.training.steps
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert records[-1]["step"] == recipe.training.steps
    assert np.mean([r["loss"] for r in records[-20:]]) < 0.15 * records[0]["loss"]


def test_6x6_checkpoint_took_at_most_ten_processor_minutes():
    records = read_metrics(FOLDER / "sudoku6" / "metrics.jsonl")
    assert records[-1]["cpu_seconds"] <= 600


def test_together_below_eight_mebibytes():
    sizes = [(FOLDER / name / "model.safetensors").stat().st_size for name in NAMES.values()]
    assert sum(sizes) < 8 * 2**20
