"""A small model with something to say, and events made by hand."""

from __future__ import annotations

import pytest
import torch

from loopmdm.config import LoopMDMConfig
from loopmdm.model import LoopMDM
from loopmdm.sampling import StepEvent


def event(step: int, *changes: tuple[int, int, int, float, int]) -> StepEvent:
    """An event of changes (sequence, position, token, confidence, loops)."""
    sequence, positions, tokens, confidence, loops = zip(*changes, strict=True)
    return StepEvent(
        step,
        torch.tensor(sequence),
        torch.tensor(positions),
        torch.tensor(tokens),
        torch.tensor(confidence),
        torch.tensor(loops),
    )


def random_model(**fields: object) -> LoopMDM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "mask_token_id": 257, "max_length": 24, "hidden_size": 16, "num_heads": 2}
    model = LoopMDM(LoopMDMConfig(**(sizes | {"num_layers": 3, "loop_start": 1, "loop_end": 2} | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> LoopMDM:
    return random_model(max_loops=3)
