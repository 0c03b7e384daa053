"""The hub form of MDLM: return types, hidden states, time conditioning, loading."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopmdm.mdlm import MDLM, MaskedLMOutput
from tests.mdlm.reference_dit import HubBackbone, randomise, reference_config

CONFIG = {
    "model_type": "mdlm",
    "vocab_size": 13,
    "model_length": 32,
    "hidden_dim": 16,
    "cond_dim": 8,
    "n_blocks": 5,
    "n_heads": 2,
    "dropout": 0.1,
}


def model_and_oracle(**changes: Any) -> tuple[MDLM, HubBackbone]:
    model = MDLM({**CONFIG, **changes}).double().eval()
    randomise(model)
    oracle = HubBackbone(reference_config(), 13).double().eval()
    state = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
    assert len(state) == len(model.state_dict()) and list(state) == list(oracle.state_dict())
    oracle.load_state_dict(state)
    return model, oracle


IDS = torch.arange(22).view(2, 11) % 13
SIGMA = torch.tensor([0.3, 2.0], dtype=torch.float64)


def test_bare_logits_by_default() -> None:
    model, oracle = model_and_oracle()
    logits = model(IDS, SIGMA)
    assert isinstance(logits, torch.Tensor)
    torch.testing.assert_close(logits, oracle(IDS, torch.zeros_like(SIGMA))[0])
    assert torch.equal(model(IDS), logits)


def test_time_conditioning() -> None:
    model, oracle = model_and_oracle(time_conditioning=True)
    torch.testing.assert_close(model(IDS, SIGMA), oracle(IDS, SIGMA)[0])


@pytest.mark.parametrize("num_loops", [1, 3])
def test_hidden_states(num_loops: int) -> None:
    model, oracle = model_and_oracle(num_loops=num_loops)
    oracle.order = [0, *[1, 2] * num_loops, 3, 4]
    expected, every = oracle(IDS, torch.zeros_like(SIGMA), output_hidden_states=True)
    logits, states = model(input_ids=IDS, timesteps=SIGMA, output_hidden_states=True)
    torch.testing.assert_close(logits, expected)
    for state, wanted in zip(states, [every[0], every[1], *every[-4:]], strict=True):
        torch.testing.assert_close(state, wanted)
    output = model(IDS, SIGMA, True, True)
    assert isinstance(output, MaskedLMOutput)
    assert torch.equal(output.logits, logits) and len(output.hidden_states or []) == 6


def test_return_dict() -> None:
    for output in (
        model_and_oracle()[0](IDS, SIGMA, return_dict=True),
        model_and_oracle(return_dict=True)[0](IDS),
    ):
        assert isinstance(output, MaskedLMOutput) and output.hidden_states is None
    assert isinstance(model_and_oracle(return_dict=True)[0](IDS, return_dict=False), torch.Tensor)


def test_missing_fields() -> None:
    with pytest.raises(ValueError, match="no field 'hidden_dim'"):
        MDLM({"vocab_size": 13})
