"""A forward pass cut at the loop is the whole one, for all sequences or for some, loop by loop or at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from loopmdm import LoopMDM, LoopMDMConfig


def make(**changes) -> LoopMDM:
    values = {
        "vocab_size": 23,
        "mask_token_id": 22,
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 5,
        "cond_dim": 8,
        "max_length": 24,
        "max_loops": 5,
        "loop_start": 1,
        "loop_end": 3,
        "gate_init": 1.0,
    }
    torch.manual_seed(0)
    model = LoopMDM(LoopMDMConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "adaLN" in name:
                value.add_(torch.randn_like(value) * 0.3)
    return model


def inputs(model: LoopMDM, batch: int = 4) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 23, (batch, 17), generator=generator)
    keys = torch.ones_like(tokens, dtype=torch.bool)
    keys[1, 11:] = False
    sigma = torch.rand(batch, generator=generator) if model.config.time_conditioning else None
    return {"input_ids": tokens, "sigma": sigma, "attention_mask": keys}


MODELS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"time_conditioning": True},
        {"positions": "learned", "loop_start": 0, "loop_end": 2},
        {"loop_start": 2, "loop_end": 5},
    ],
    ids=["plain", "time", "no head", "no tail"],
)


@MODELS
@pytest.mark.parametrize("num_loops", [1, 4, torch.tensor([3, 1, 5, 2])], ids=["1", "4", "each"])
@torch.no_grad()
def test_stages_are_the_whole_pass(changes, num_loops):
    model = make(**changes)
    given = inputs(model)
    stages = model.stages(**given)
    cut = stages.after(stages.loop(stages.before(), num_loops))
    assert torch.equal(cut, model.hidden(**given, num_loops=num_loops))
    assert torch.equal(stages.masked, given["input_ids"] == 22)


@MODELS
@torch.no_grad()
def test_loop_by_loop_with_sequences_leaving(changes):
    """Running one loop at a time on ever fewer sequences gives what the op gives for one S each."""
    model = make(**changes)
    given, wanted = inputs(model), torch.tensor([3, 1, 5, 2])
    stages = model.stages(**given)
    out = stages.before()
    active, part = torch.arange(4), stages
    for loop in range(1, 6):
        out[active] = part.loop(out[active])
        keep = wanted[active] > loop
        active, part = active[keep], part.subset(keep)
    assert torch.equal(stages.after(out), model.hidden(**given, num_loops=wanted))


@MODELS
@torch.no_grad()
def test_subset_is_the_pass_of_those_sequences(changes):
    model = make(**changes)
    given, chosen = inputs(model), torch.tensor([3, 1])
    part = model.stages(**given).subset(chosen)
    alone = model.stages(**{k: None if v is None else v[chosen] for k, v in given.items()})
    h = part.before()
    close = {"rtol": 1e-4, "atol": 1e-4} if model.config.time_conditioning else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(h, alone.before(), **close)
    torch.testing.assert_close(part.loop(h, 2), alone.loop(h, 2), **close)
    torch.testing.assert_close(part.after(h), alone.after(h), **close)
    assert torch.equal(part.tokens, alone.tokens)


@torch.no_grad()
def test_threshold_counts_the_loops_of_each_sequence():
    model = make()
    stages = model.stages(**inputs(model))
    states = [stages.before()]
    for _ in range(5):
        states.append(stages.loop(states[-1]))
    change = torch.stack(
        [(b - a).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1) for a, b in pairwise(states)]
    )
    eps = float(change[2].sort().values[1:3].mean())
    below = change < eps
    expected = torch.where(below.any(dim=0), below.long().argmax(dim=0) + 1, 5)
    assert len(set(expected.tolist())) > 1
    out, used = stages.loop(states[0], 5, exit_threshold=eps)
    assert torch.equal(used, expected)
    assert torch.equal(out, torch.stack([states[int(k)][i] for i, k in enumerate(used)]))


def test_dropout_is_named_by_the_seed():
    model = make(dropout=0.2).train()
    given = inputs(model)
    first = model.hidden(**given, num_loops=3, dropout_seed=5)
    stages = model.stages(**given, dropout_seed=5)
    assert torch.equal(stages.after(stages.loop(stages.before(), 3)), first)
    assert not torch.equal(model.hidden(**given, num_loops=3, dropout_seed=6), first)


def test_gradients_pass_through_the_stages():
    model = make()
    given = inputs(model)
    model.hidden(**given, num_loops=2).square().mean().backward()
    expected = [p.grad.clone() for p in model.blocks.parameters()]
    model.zero_grad()
    stages = model.stages(**given)
    stages.after(stages.loop(stages.loop(stages.before()))).square().mean().backward()
    for parameter, grad in zip(model.blocks.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def test_bad_input_is_named():
    model = make()
    with pytest.raises(TypeError, match="input_ids"):
        model.stages([[1, 2]])
    with pytest.raises(ValueError, match="attention_mask"):
        model.stages(torch.zeros(2, 3, dtype=torch.int64), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="num_loops"):
        stages = model.stages(torch.zeros(2, 3, dtype=torch.int64))
        stages.loop(stages.before(), 0)


@torch.no_grad()
def test_frozen_weights_are_read_once():
    model = make()
    given = inputs(model)
    calls = []
    model.sigma_map.register_forward_hook(lambda *_: calls.append(1))
    plain = model.hidden(**given, num_loops=2)
    with model.frozen():
        calls.clear()
        assert all(torch.equal(model.hidden(**given, num_loops=2), plain) for _ in range(3))
        assert len(calls) == 1
        with torch.enable_grad():
            assert model.hidden(**given, num_loops=2).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model.hidden(**given, num_loops=2)
        assert torch.equal(model.hidden(**given, num_loops=2), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow, model.hidden(**given, num_loops=2))
    model.blocks[0].adaLN_modulation.bias.add_(1.0)
    assert not torch.equal(model.hidden(**given, num_loops=2), plain)


@torch.no_grad()
def test_frozen_does_not_mix_noise_levels():
    model = make(time_conditioning=True)
    given = inputs(model)
    other = given | {"sigma": given["sigma"] * 2}
    plain = [model.hidden(**one, num_loops=2) for one in (given, other)]
    with model.frozen():
        for one, expected in zip((given, other, given), (*plain, plain[0]), strict=True):
            assert torch.equal(model.hidden(**one, num_loops=2), expected)
