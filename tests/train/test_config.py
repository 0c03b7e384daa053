"""Hyper-parameters: checks, JSON, learning rates."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loopmdm.train import TrainConfig


def test_defaults_are_those_of_the_reference() -> None:
    config = TrainConfig(steps=1_000_000)
    assert config.learning_rate == 3e-4 and config.betas == (0.9, 0.999) and config.eps == 1e-8
    assert config.weight_decay == 0 and config.warmup_steps == 2500 and config.schedule == "constant"
    assert config.clip == 1.0 and config.ema == 0.9999


def test_json_round_trip() -> None:
    config = TrainConfig(
        steps=7, betas=(0.8, 0.95), clip=None, schedule="cosine", precision="bf16", seed=2**40
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 1.5}, TypeError, "steps must be int"),
        ({"batch_size": -1}, ValueError, "batch_size"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be two numbers"),
        ({"schedule": "step"}, ValueError, "schedule must be one of constant, cosine, linear, got 'step'"),
        ({"precision": "fp16"}, ValueError, "precision must be one of fp32, bf16"),
        ({"ema": 1.5}, ValueError, r"ema must be in \[0, 1\]"),
        ({"clip": 0.0}, ValueError, "clip must be positive"),
        ({"decay_fraction": 2.0}, ValueError, "decay_fraction"),
        ({"seed": True}, TypeError, "seed must be int"),
        ({"loop_law": 3}, TypeError, "loop_law must be a string"),
        ({"recompute": 1}, TypeError, "recompute"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**({"steps": 10} | changes))


def test_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="unknown training option lr; known: steps, "):
        TrainConfig.from_dict({"steps": 1, "lr": 1e-3})


def test_warm_up_then_constant() -> None:
    config = TrainConfig(steps=10, learning_rate=0.4, warmup_steps=4)
    rates = [config.learning_rate_at(step) for step in range(10)]
    assert rates == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 7)


def test_linear_decay_over_the_last_part() -> None:
    config = TrainConfig(steps=10, learning_rate=1.0, warmup_steps=2, schedule="linear", decay_fraction=0.4)
    rates = [config.learning_rate_at(step) for step in range(11)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_cosine_decay_starts_after_the_warm_up() -> None:
    config = TrainConfig(steps=6, learning_rate=2.0, warmup_steps=2, schedule="cosine", decay_fraction=1.0)
    rates = [config.learning_rate_at(step) for step in range(7)]
    half = 0.5**0.5
    assert rates == pytest.approx([1, 2, 2, 1 + half, 1, 1 - half, 0])
