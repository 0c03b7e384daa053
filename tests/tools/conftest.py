"""A small model whose every parameter matters, and the tokens it is tried on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopmdm import LoopMDM, LoopMDMConfig

CONFIG = LoopMDMConfig(
    vocab_size=40,
    mask_token_id=39,
    hidden_size=32,
    num_heads=2,
    num_layers=3,
    cond_dim=8,
    max_length=16,
    dropout=0.0,
    loop_start=1,
    loop_end=2,
    max_loops=3,
)


@pytest.fixture
def model() -> LoopMDM:
    torch.manual_seed(0)
    made = LoopMDM(CONFIG).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(39, (2, 16), generator=torch.Generator().manual_seed(1))
