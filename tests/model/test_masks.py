"""Masks that are no masks of zeros and ones are refused: read as booleans they are upside down."""

from __future__ import annotations

import pytest
import torch

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.data.batches import Batch
from loopmdm.model.masks import boolean
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.quality.likelihood import evaluate_nll

SIZES = {"hidden_size": 32, "num_heads": 2, "num_layers": 3, "max_length": 16, "dropout": 0.0}
MODEL = LoopMDM(LoopMDMConfig(vocab_size=40, mask_token_id=39, cond_dim=8, **SIZES)).eval()
TOKENS = torch.randint(39, (2, 16), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[True] * 10 + [False] * 6] * 2)
PADDING = (~REAL).float()
ADDITIVE = {
    "-1e9": PADDING * -1e9,
    "min": PADDING * torch.finfo(torch.float32).min,
    "integers": PADDING.long() * -10_000,
    "-inf": torch.zeros(2, 16).masked_fill(~REAL, -torch.inf),
}
DTYPES = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_ones_of_any_dtype(dtype):
    assert torch.equal(boolean("attention_mask", REAL.to(dtype)), REAL)
    assert int(MODEL.loss(TOKENS, attention_mask=REAL.to(dtype), seed=0).num_tokens) == 20
    expected = MODEL(TOKENS, attention_mask=REAL)
    assert torch.equal(MODEL(TOKENS, attention_mask=REAL.to(dtype)), expected)


@pytest.mark.parametrize("name", list(ADDITIVE))
def test_additive_masks_are_refused(name):
    mask = ADDITIVE[name]
    causal = CausalLM(CausalConfig(40, 39, hidden_size=32, num_heads=2, num_layers=3, max_length=16))
    calls = {
        "forward": lambda: MODEL(TOKENS, attention_mask=mask),
        "loss": lambda: MODEL.loss(TOKENS, attention_mask=mask, seed=0),
        "labels": lambda: MODEL(TOKENS, attention_mask=mask, labels=TOKENS),
        "hidden": lambda: MODEL.hidden(TOKENS, attention_mask=mask),
        "stages": lambda: MODEL.stages(TOKENS, attention_mask=mask),
        "evaluate": lambda: evaluate_nll(MODEL, [Batch(TOKENS, attention_mask=mask)], num_loops=[1]),
        "causal": lambda: causal.loss(TOKENS, mask),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=r"attention_mask: got values other than 0 and 1.*additive"):
            call()
            pytest.fail(what)
    with pytest.raises(ValueError, match="prompt_mask: got values other than 0 and 1"):
        MODEL.loss(TOKENS, prompt_mask=mask, seed=0)


def test_other_values():
    for values in ([0.0, 2.0], [0.5, 1.0], [float("nan"), 1.0], [0, 255]):
        with pytest.raises(ValueError, match="other than 0 and 1"):
            boolean("attention_mask", torch.tensor(values))
