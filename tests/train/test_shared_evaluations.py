"""Evaluations that ranks share say what those of one process say, to the bit."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.data.batches import Batch
from loopmdm.data.sudoku import SIX
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.runs.boards import held_out_puzzles
from loopmdm.runs.evaluation import BoardEvaluation, CausalEvaluation
from loopmdm.runs.text_data import Windows
from loopmdm.train import SharedEvaluation


def by_ranks(evaluation: SharedEvaluation, model: Any, world_size: int) -> str:
    parts = [evaluation.part(model, rank, world_size) for rank in range(world_size)]
    parts = pickle.loads(pickle.dumps(parts))  # as they travel
    document = evaluation.whole(parts)
    for way in document.get("solved", []):
        assert way.pop("seconds") > 0
    return json.dumps(document)


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("world_size", [2, 3, 7])  # 7: some solve none
def test_puzzles(world_size: int) -> None:
    sizes = {
        "hidden_size": 16,
        "num_heads": 2,
        "num_layers": 2,
        "loop_start": 0,
        "loop_end": 2,
        "max_loops": 2,
    }
    model = randomised(LoopMDM(LoopMDMConfig(vocab_size=7, mask_token_id=6, max_length=36, **sizes)))
    evaluation = BoardEvaluation(SIX, lambda: held_out_puzzles(SIX, 5).clues, samples=2)
    alone = by_ranks(evaluation, model, 1)
    document = json.loads(alone)
    assert [way["puzzles"] for way in document["solved"]] == [5] * len(document["solved"])
    assert len({sample["text"] for sample in document["samples"]}) > 1
    assert by_ranks(evaluation, model, world_size) == alone


def test_puzzles_take_as_long_as_the_slowest_rank() -> None:
    evaluation = BoardEvaluation(SIX, lambda: held_out_puzzles(SIX, 5).clues, samples=0)
    model = randomised(LoopMDM(LoopMDMConfig.preset("sudoku6", hidden_size=16, num_heads=2, max_loops=1)))
    parts = [evaluation.part(model, rank, 2) for rank in range(2)]
    times = [[one.result.seconds for one in part] for part in parts]
    found = [one["seconds"] for one in evaluation.whole(parts)["solved"]]
    assert found == [max(seconds) for seconds in zip(*times, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_text_of_an_autoregressive_model(world_size: int) -> None:
    model = randomised(
        CausalLM(CausalConfig(20, 19, hidden_size=16, num_heads=2, num_layers=2, max_length=8))
    )
    ids = torch.randint(19, (9, 8), generator=torch.Generator().manual_seed(1))
    evaluation = CausalEvaluation(Windows([Batch(part) for part in ids.split(2)], 1.5))
    alone = by_ranks(evaluation, model, 1)
    assert json.loads(alone)["held_out"][0]["num_tokens"] == 72
    assert by_ranks(evaluation, model, world_size) == alone
    assert len(evaluation.part(model, 0, 2)) == 3  # of five batches
