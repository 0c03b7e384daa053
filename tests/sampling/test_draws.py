"""What may be drawn: forbidden tokens, the most probable ones, and the reference's own race."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from loopmdm import sample
from loopmdm.sampling.reference_numerics import race


def test_forbidden_tokens_are_never_drawn(make_fixed):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
    out = sample(make_fixed(logits), 30_000, forbidden=[0, 4], seed=5, history=True)
    counts = out.tokens.flatten().bincount(minlength=5)
    assert counts[0] == counts[4] == 0
    expected = logits[0, 1:4].double().softmax(0)
    assert stats.chisquare(counts[1:4], expected * 30_000).pvalue > 0.01
    confidence = torch.cat([event.confidence for event in out.history])
    drawn = torch.cat([event.tokens for event in out.history])
    assert torch.allclose(confidence.double(), expected[drawn - 1], rtol=1e-4)


def test_whole_stretches_of_the_vocabulary_may_be_forbidden(make_fixed):
    """More than a kernel's tile, and the first of them."""
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1))
    out = sample(make_fixed(logits), 5000, forbidden=range(2990), seed=5, order="confidence")
    counts = out.tokens.flatten().bincount(minlength=3000)
    assert counts[:2990].sum() == 0
    assert stats.chisquare(counts[2990:], logits[0, 2990:].double().softmax(0) * 5000).pvalue > 0.01


def test_orders_rate_what_may_be_drawn(make_fixed):
    """Without token 0 position 1 is the surer one."""
    logits = torch.tensor([[5.0, 1.0, 0.9], [0.0, 3.0, 0.0]])
    for forbidden, first in ((None, 0), ([0], 1)):
        out = sample(
            make_fixed(logits), 1, order="confidence", forbidden=forbidden, temperature=0.0, history=True
        )
        assert out.history[0].positions.tolist() == [first]


def test_top_k(make_fixed):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    counts = sample(make_fixed(logits), 20_000, top_k=2, seed=3).tokens.flatten().bincount(minlength=4)
    assert counts[2:].sum() == 0
    assert stats.chisquare(counts[:2], logits[0, :2].double().softmax(0) * 20_000).pvalue > 0.01
    assert (sample(make_fixed(logits), 50, top_k=1).tokens == 0).all()


def survival(probability: Tensor, t: float, s: float, bits: int) -> Tensor:
    """f(r) of `reference_numerics`, float64, for uniforms of so many bits."""
    ratio = 2.0**bits * probability.double() * (t - s) / s
    return 1.0 / (ratio * torch.expm1(1.0 / ratio))


def raced(probs: Tensor, t: float, s: float, bits: int, num: int) -> Tensor:
    """Counts [V + 1] of the reference's race with uniforms of so many bits; the last entry is the mask."""
    vocab = probs.numel()
    table = torch.cat((probs, torch.zeros(1))).expand(50_000, -1)
    generator = torch.Generator().manual_seed(4)
    counts = torch.zeros(vocab + 1, dtype=torch.int64)
    for _ in range(num // 50_000):
        uniform = torch.randint(2**bits, table.shape, generator=generator) * 2.0**-bits
        counts += race(table.clone(), vocab, t, s, uniform).bincount(minlength=vocab + 1)
    return counts


@pytest.mark.parametrize(("ratio", "factor"), [(4.0, 0.880), (1.0, 0.582), (0.5, 0.313), (0.25, 0.075)])
def test_the_references_race_loses_rare_tokens_as_calculated(ratio, factor):
    """Trap 1 of the reference facts, at 12 bits, where rare is affordable: f(r) of its share is left."""
    t, num, bits = 1.0, 1_500_000, 12
    s = t / (1 + ratio / 16 * 2.0 ** (4 - bits) * 20)  # 20 tokens of 1/20 each: r = 2^12 (t - s) / (20 s)
    probs = torch.full((20,), 0.05)
    expected_factor = float(survival(torch.tensor(0.05), t, s, bits))
    assert expected_factor == pytest.approx(factor, abs=2e-3)
    counts = raced(probs, t, s, bits, num)
    expected = num * (t - s) / t * expected_factor
    assert abs(int(counts[:20].sum()) - expected) < 4 * expected**0.5 + 0.01 * expected


def test_the_references_race_loses_entropy_as_calculated():
    probs = 1.0 / (torch.arange(200, dtype=torch.float64) + 2.7)
    probs /= probs.sum()
    t, bits = 1.0, 12
    s = t / (1 + 1 / 100)
    left = probs * survival(probs, t, s, bits)
    left /= left.sum()
    counts = raced(probs.float(), t, s, bits, 1_500_000)[:200].double()
    measured = counts / counts.sum()

    def entropy(law: Tensor) -> float:
        return float(-torch.xlogy(law, law).sum())

    assert entropy(left) < entropy(probs) - 0.4
    bias = int((counts > 0).sum()) / (2 * float(counts.sum()))  # of an entropy estimated from counts
    assert abs(entropy(measured) + bias - entropy(left)) < 0.04


def test_reference_numerics_reveals_at_the_rate_of_the_process(make_fixed):
    """Where no token is rare its law is that of the process: reveal steps are uniform."""
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(8, 3)
    steps, num = 16, 600
    out = sample(make_fixed(logits), num, steps=steps, reference_numerics=True, seed=3, history=True, plan=1)
    counts = torch.zeros(steps + 1)
    tokens = []
    for event in out.history:
        counts[event.step] += event.tokens.numel()
        tokens.append(event.tokens)
    assert counts[steps] <= 3  # 8 * 600 positions, left over with probability 1e-5
    assert stats.chisquare(counts[:steps], [float(counts[:steps].sum()) / steps] * steps).pvalue > 0.01
    law = torch.cat(tokens).bincount(minlength=3)
    assert stats.chisquare(law, logits[0].double().softmax(0) * law.sum()).pvalue > 0.01


def test_the_references_sampler_reuses_predictions(model):
    """Calls of a sequence: the first step, each step after a change, and none otherwise."""
    out = sample(model, 3, length=10, steps=200, reference_numerics=True, seed=1, history=True, plan=2)
    assert out.num_steps == 200
    changes = torch.zeros(3, dtype=torch.int64)
    for event in out.history:
        changes[event.sequence.unique()] += 1
    assert (out.network_calls == changes).all()  # the last change needs no call after it
    assert not out.exact
    full = sample(
        model, 3, length=10, steps=200, reference_numerics=True, seed=1, plan=2, skip_unchanged=False
    )
    assert torch.equal(full.tokens, out.tokens)
    assert (full.network_calls > out.network_calls).all()
