"""The averaged weights against their recursion in float64."""

from __future__ import annotations

import pytest
import torch
from toy_training import ToyModel

from loopmdm.train import EMA


def test_recursion_with_warm_up() -> None:
    model = torch.nn.Linear(5, 3)
    ema = EMA(model, decay=0.6)
    shadow = [p.detach().double() for p in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 31):
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        ema.update()
        decay = min(0.6, (1 + n) / (10 + n))
        shadow = [s - (1 - decay) * (s - p.double()) for s, p in zip(shadow, model.parameters(), strict=True)]
        for got, expected in zip(ema.shadow, shadow, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.updates == 30


def test_closed_form_for_constant_weights() -> None:
    """From 0 to constant weights 1: 1 - product of the decays; (1+n)/(10+n) telescopes."""
    model = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.9999)
    torch.nn.init.ones_(model.weight)
    expected = 1.0
    for n in range(1, 41):
        ema.update()
        expected *= (1 + n) / (10 + n)
    torch.testing.assert_close(ema.shadow[0], torch.full((2, 2), 1 - expected))


def test_order_precision_and_frozen_parameters() -> None:
    model = ToyModel()
    model.mix.requires_grad_(False)
    model.out.data = model.out.data.bfloat16()
    ema = EMA(model, decay=0.9)
    assert ema.names == [name for name, p in model.named_parameters() if p.requires_grad]
    assert "mix" not in ema.names
    ema.update()
    assert all(s.dtype == torch.float32 for s in ema.shadow)


def test_applied_swaps_and_restores_exactly() -> None:
    model = ToyModel()
    ema = EMA(model, decay=0.9)
    averages = [s.clone() for s in ema.shadow]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    weights = [p.detach().clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    with pytest.raises(KeyError), ema.applied():
        assert all(map(torch.equal, model.parameters(), averages))
        assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
        raise KeyError
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(map(torch.equal, ema.shadow, averages))
