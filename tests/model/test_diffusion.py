"""The forward process and the objective: E5, E6, E7."""

import itertools
import math

import pytest
import torch

from loopmdm.model import diffusion


@pytest.mark.parametrize("t", [0.001, 0.1, 0.5, 0.99, 1.0])
def test_e5_masked_share(t):
    frozen = torch.zeros(400, 500, dtype=torch.bool)
    masked = diffusion.draw_mask(torch.full((400,), t), frozen, torch.Generator().manual_seed(0))
    p = 0.999 * t
    assert abs(masked.float().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / masked.numel())


def test_e5_frozen_positions_are_never_masked():
    frozen = torch.zeros(50, 60, dtype=torch.bool)
    frozen[:, ::3] = True
    masked = diffusion.draw_mask(torch.full((50,), 0.9), frozen, torch.Generator().manual_seed(0))
    assert not bool((masked & frozen).any()) and bool(masked.any())


def test_stratified_times():
    t = diffusion.sample_t(1000, torch.Generator().manual_seed(1))
    u = (t - 1e-3) / (1 - 1e-3)
    assert torch.equal((u.double() * 1000).floor().long().clamp_max(999).sort().values, torch.arange(1000))
    assert t.min() >= 1e-3 and t.max() < 1
    assert not torch.equal(t, diffusion.sample_t(1000, torch.Generator().manual_seed(2)))


def test_weight_is_the_derivative_of_the_noise():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).requires_grad_()
    sigma = diffusion.sigma(t)
    (rate,) = torch.autograd.grad(sigma.sum(), t)
    torch.testing.assert_close(diffusion.loss_weight(t), rate / torch.expm1(sigma), rtol=1e-10, atol=0)
    torch.testing.assert_close(diffusion.mask_probability(t), -torch.expm1(-sigma), rtol=1e-10, atol=1e-12)


def test_e6_subs():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 3
    tokens = torch.tensor([[0, 6, 2, 6, 6]] * 3)
    probs = diffusion.subs_log_probs(logits, tokens, 6).exp()
    assert bool((probs[..., 6] == 0).all())
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 5), rtol=0, atol=1e-6)
    one_hot = torch.nn.functional.one_hot(tokens[:, [0, 2]], 7).float()
    assert torch.equal(probs[:, [0, 2]], one_hot)
    expected = torch.softmax(logits[:, [1, 3, 4], :6], -1)
    torch.testing.assert_close(probs[:, [1, 3, 4], :6], expected)


class Toy:
    """A joint law of L = 4 tokens from V = 3 with its exact posterior."""

    length, vocab = 4, 3

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.states = torch.tensor(list(itertools.product(range(self.vocab), repeat=self.length)))
        self.law = torch.softmax(2 * torch.randn(len(self.states), generator=generator).double(), 0)

    @property
    def entropy(self) -> float:
        return float(-(self.law * self.law.log()).sum())

    def nll(self, clean, masked):
        """-log p(x0^i | visible tokens) at every position, [B, L]."""
        agree = ((self.states[None] == clean[:, None]) | masked[:, None]).all(-1)  # [B, states]
        weight = self.law * agree
        same = self.states[None] == clean[:, None]  # [B, states, L]
        return -((weight[..., None] * same).sum(1) / weight.sum(1, keepdim=True)).log()


def test_e7_nelbo_of_the_exact_posterior_is_the_entropy():
    toy = Toy()
    generator = torch.Generator().manual_seed(0)
    num = 200_000
    clean = toy.states[torch.multinomial(toy.law, num, replacement=True, generator=generator)]
    t = diffusion.sample_t(num, generator)[torch.randperm(num, generator=generator)]
    masked = diffusion.draw_mask(t, torch.zeros_like(clean, dtype=torch.bool), generator)
    per_token = torch.where(masked, toy.nll(clean, masked), 0.0)
    nelbo = (per_token * diffusion.loss_weight(t)[:, None].double()).sum(1)
    error = nelbo.std() / math.sqrt(num)
    # eps = 1e-3 biases the estimate by about 0.1 %: the mask probability is 0.999 t, and t starts at 1e-3.
    assert abs(nelbo.mean() - toy.entropy) < 3 * error + 2e-3 * toy.entropy

    # The discrete form: n ~ U{1..L} masked positions, loss = (1/n) sum of the n cross-entropies, times L.
    count = torch.randint(1, toy.length + 1, (num,), generator=generator)
    order = torch.rand(num, toy.length, generator=generator).argsort(1).argsort(1)
    masked = order < count[:, None]
    discrete = torch.where(masked, toy.nll(clean, masked), 0.0).sum(1) / count * toy.length
    assert abs(discrete.mean() - toy.entropy) < 3 * discrete.std() / math.sqrt(num)
