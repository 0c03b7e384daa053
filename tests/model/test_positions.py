"""Rotary positions do not depend on the dtype of the parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.mdlm import DIT, MDLM
from loopmdm.quality.causal import CausalConfig, CausalLM

SIZES = {"hidden_size": 32, "num_heads": 2, "num_layers": 3, "max_length": 1024, "dropout": 0.0}
CONFIG = LoopMDMConfig(vocab_size=64, mask_token_id=63, cond_dim=8, gate_init=1.0, **SIZES)
CASTS = {
    "bfloat16()": lambda module: module.bfloat16(),
    "half()": lambda module: module.half(),
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
}


def exact():
    frequency = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    return torch.outer(torch.arange(1024, dtype=torch.float64), frequency)


def models():
    hub = {"vocab_size": 64, "model_length": 1024, "hidden_dim": 32, "cond_dim": 8}
    hub |= {"n_blocks": 3, "n_heads": 2, "dropout": 0.0}
    return {
        "LoopMDM": lambda: LoopMDM(CONFIG),
        "DIT": lambda: DIT(CONFIG),
        "MDLM": lambda: MDLM(hub).backbone,
        "CausalLM": lambda: CausalLM(CausalConfig(64, 63, hidden_size=32, num_heads=2, num_layers=3)),
    }


@pytest.mark.parametrize("cast", list(CASTS))
@pytest.mark.parametrize("kind", ["LoopMDM", "DIT", "MDLM", "CausalLM"])
def test_angles_stay_in_fp32(kind, cast):
    rotary = CASTS[cast](models()[kind]()).rotary_emb(1024)
    for got, expected in zip(rotary, (exact().cos(), exact().sin()), strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - expected).abs().max() < 1e-4  # positions up to 1023 times eps of fp32


@pytest.mark.parametrize("kind", ["LoopMDM", "CausalLM"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_way_through_half_precision_does_not_round_angles(kind, narrow, tmp_path):
    """Frequencies that a cast or a file rounded are exact again in fp32 and float64."""
    made = models()[kind]()
    plain = made.rotary_emb(1024)
    made.to(narrow).save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not torch.equal(file.get_tensor("rotary_emb.inv_freq").float(), loaded.rotary_emb.inv_freq)
    for back in (loaded, made.float(), made.to(narrow).double().float()):
        for got, expected in zip(back.rotary_emb(1024), plain, strict=True):
            assert torch.equal(got, expected)
    for got, expected in zip(made.double().rotary_emb(1024), (exact().cos(), exact().sin()), strict=True):
        assert (got - expected).abs().max() < 1e-4
    other = made.float()
    other.rotary_emb.inv_freq.copy_(1 / 5e5 ** (torch.arange(8) / 8))  # another base stays what it is
    base = torch.outer(torch.arange(9.0), 1 / 5e5 ** (torch.arange(8) / 8))
    torch.testing.assert_close(other.rotary_emb(9)[0], base.cos())


@pytest.mark.parametrize("patched", [False, True])
def test_neighbours_are_told_apart(patched):
    """Beyond position 256 a bf16 model saw two tokens in either order alike."""
    torch.manual_seed(0)
    model = LoopMDM(CONFIG).eval()
    with torch.no_grad():
        model.vocab_embed.embedding.normal_()
        model.output_layer.linear.weight.normal_(0, 0.3)
        for block in model.blocks:
            block.attn_qkv.weight.mul_(3)
    tokens = torch.full((1, 1024), 63)
    tokens[0, 601:603] = torch.tensor([5, 9])
    swapped = tokens.clone()
    swapped[0, 601:603] = torch.tensor([9, 5])

    def moved(model):
        if patched:
            reference = DIT(CONFIG).eval().to(model.device, model.vocab_embed.embedding.dtype)
            reference.load_state_dict(model.state_dict())
            sigma = torch.zeros(1)
            difference = reference(tokens, sigma) - reference(swapped, sigma)
        else:
            difference = model(tokens, num_loops=1) - model(swapped, num_loops=1)
        difference[0, 601:603] = 0
        return difference.float().abs().max()

    assert moved(copy.deepcopy(model).bfloat16()) > moved(model) / 2
