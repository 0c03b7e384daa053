"""The law of the samples, against exact answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm import sample

from .conftest import reveal_steps


def joint_law(length: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (num_tokens,) * length
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64).flatten().softmax(0).view(shape).float()
    )


def frequencies(tokens: Tensor, num_tokens: int) -> Tensor:
    length = tokens.shape[1]
    codes = (tokens * num_tokens ** torch.arange(length - 1, -1, -1)).sum(dim=1)
    return torch.bincount(codes, minlength=num_tokens**length).view((num_tokens,) * length)


def enumerate_ancestral(model: torch.nn.Module, num_tokens: int, length: int, steps: int) -> Tensor:
    """The sampler's exact law [V] * L: all reveal-step assignments, all tokens, predictions from `model`."""
    mask = model.config.mask_token_id
    states = list(itertools.product([*range(num_tokens), mask], repeat=length))
    with torch.inference_mode():
        logits = model(torch.tensor(states), num_loops=model.config.max_loops).double()
    probs = dict(zip(states, logits[..., :num_tokens].softmax(-1), strict=True))
    law = torch.zeros((num_tokens,) * length, dtype=torch.float64)
    for reveal in itertools.product(range(steps), repeat=length):
        for final in itertools.product(range(num_tokens), repeat=length):
            probability = torch.tensor(1.0 / steps**length, dtype=torch.float64)
            for step in sorted(set(reveal)):
                state = tuple(final[p] if reveal[p] < step else mask for p in range(length))
                for position in range(length):
                    if reveal[position] == step:
                        probability = probability * probs[state][position, final[position]]
            law[final] += probability
    return law


def test_exact_denoiser_gives_the_data_law_e8(make_posterior):
    law = joint_law(4, 3)
    num_samples = 200_000
    out = sample(make_posterior(law), num_samples, steps=512, seed=11, max_batch=8192)
    measured = frequencies(out.tokens, 3) / num_samples
    assert 0.5 * (measured - law).abs().sum() < 0.02


def test_few_steps_follow_the_factorised_law(make_posterior):
    """At T = 1 all positions are drawn at once, so the law is the product of the marginals."""
    law = joint_law(3, 3)
    out = sample(make_posterior(law), 50_000, steps=1, seed=2, max_batch=8192)
    marginals = [law.sum(dim=[a for a in range(3) if a != axis]) for axis in range(3)]
    expected = torch.einsum("i,j,k->ijk", *marginals).double()
    observed = frequencies(out.tokens, 3).double()
    scaled = expected / expected.sum() * observed.sum()
    assert stats.chisquare(observed.flatten(), scaled.flatten()).pvalue > 0.01
    assert out.total_network_calls == 50_000


@pytest.mark.parametrize("steps", [2, 4])
def test_network_law_equals_enumeration(make_model, steps):
    model = make_model(vocab_size=4, mask_token_id=3, max_length=3, num_layers=3, hidden_size=8).eval()
    num_samples = 100_000
    with lk.use_backend("reference"):
        law = enumerate_ancestral(model, 3, 3, steps)
        out = sample(model, num_samples, length=3, steps=steps, seed=steps, max_batch=8192)
    assert law.sum() == pytest.approx(1.0, abs=1e-9)
    assert 0.5 * (law - joint_product(law)).abs().sum() > 0.01, "the toy must have dependent tokens"
    observed = frequencies(out.tokens, 3).double()
    assert stats.chisquare(observed.flatten(), (law / law.sum() * num_samples).flatten()).pvalue > 0.01


def joint_product(law: Tensor) -> Tensor:
    marginals = [law.sum(dim=[a for a in range(law.ndim) if a != axis]) for axis in range(law.ndim)]
    return torch.einsum("i,j,k->ijk", *marginals)


def test_temperature_and_top_p(make_fixed):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    model = make_fixed(logits)
    num_samples = 100_000
    out = sample(model, num_samples, temperature=2.0, seed=5)
    expected = (logits[0].double() / 2).softmax(0) * num_samples
    assert stats.chisquare(out.tokens.flatten().bincount(minlength=4), expected).pvalue > 0.01

    out = sample(model, num_samples, top_p=0.7, seed=6)  # .644 and .237 reach .7
    expected = logits[0, :2].double().softmax(0) * num_samples
    counts = out.tokens.flatten().bincount(minlength=4)
    assert counts[2:].sum() == 0
    assert stats.chisquare(counts[:2], expected).pvalue > 0.01

    assert (sample(model, 50, temperature=0.0).tokens == 0).all()


def test_reveal_steps_are_uniform_and_independent(make_fixed):
    """The hazard of the two-stage form: of the positions still masked at step i, 1/(T - i) are revealed."""
    steps, num_samples = 5, 20_000
    out = sample(make_fixed(torch.zeros(2, 3)), num_samples, steps=steps, seed=1, history=True)
    reveal = reveal_steps(out)
    table = torch.bincount(reveal[:, 0] * steps + reveal[:, 1], minlength=steps**2)
    assert stats.chisquare(table).pvalue > 0.01
