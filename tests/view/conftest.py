"""A small model with something to say, and events made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopmdm import LoopMDM, LoopMDMConfig
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


def random_model(**overrides: Any) -> LoopMDM:
    """A byte model, all parameters random."""
    sizes: dict[str, Any] = {
        "vocab_size": 258,
        "mask_token_id": 257,
        "hidden_size": 16,
        "num_heads": 2,
        "num_layers": 3,
        "cond_dim": 8,
        "max_length": 24,
        "loop_start": 1,
        "loop_end": 2,
        "max_loops": 3,
        **overrides,
    }
    model = LoopMDM(LoopMDMConfig(**sizes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        model.output_layer.norm_final.weight.add_(2)
        for block in model.blocks:
            for gain in (block.norm1.weight, block.norm2.weight, block.adaLN_modulation.bias):
                gain.add_(1)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> LoopMDM:
    return random_model()
