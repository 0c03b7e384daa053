"""The law of every order on toys whose answer is known exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from loopmdm import sample


def joint_law(length: int, num_tokens: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn((num_tokens,) * length, generator=generator, dtype=torch.float64)
    return logits.flatten().softmax(0).view((num_tokens,) * length).float()


def chi_square_p(tokens: Tensor, law: Tensor) -> float:
    num_tokens, length = law.shape[0], law.ndim
    codes = (tokens * num_tokens ** torch.arange(length - 1, -1, -1)).sum(dim=1)
    observed = torch.bincount(codes, minlength=law.numel()).double()
    expected = law.double().flatten() / law.double().sum() * observed.sum()
    return float(stats.chisquare(observed, expected).pvalue)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "first_hitting"},
        {"order": "random"},
        {"order": "left_to_right"},
        {"order": "ancestral", "steps": 400},
        {"order": "ancestral", "steps": 400, "block_length": 2},
        {"order": "first_hitting", "block_length": 3},
        {"order": "random", "window": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_one_position_a_step_gives_the_data_law_e8(make_posterior, options):
    """With the exact posterior, any order that does not look at the tokens is exact (chain rule)."""
    law = joint_law(3, 3)
    out = sample(make_posterior(law), 40_000, seed=7, max_batch=8192, **options)
    assert chi_square_p(out.tokens, law) > 0.01


RATINGS = {
    "confidence": lambda p: float(p.max()),
    "margin": lambda p: float(p.sort(descending=True).values[:2] @ torch.tensor([1.0, -1.0]).double()),
    "entropy": lambda p: float((p * p.log()).sum()),
}


@pytest.mark.parametrize("order", RATINGS)
def test_rated_orders_follow_their_enumerated_law(make_posterior, order):
    """Drawing at temperature 2 from the posterior, so that the law depends on the order."""
    law = joint_law(3, 3, seed=5)

    def tempered(marginal: Tensor) -> Tensor:
        return (marginal.log() / 2).softmax(0)

    expected = torch.zeros_like(law, dtype=torch.float64)

    def fill(state, probability):
        masked = [p for p in range(3) if state[p] is None]
        if not masked:
            expected[state] += probability
            return
        given = law.double()[tuple(slice(None) if t is None else slice(t, t + 1) for t in state)]
        marginals = {p: given.sum(dim=[a for a in range(3) if a != p]) for p in masked}
        marginals = {p: m / m.sum() for p, m in marginals.items()}
        best = max(masked, key=lambda p: (RATINGS[order](marginals[p]), -p))
        for token, chance in enumerate(tempered(marginals[best]).tolist()):
            fill(tuple(token if p == best else t for p, t in enumerate(state)), probability * chance)

    fill((None, None, None), 1.0)
    out = sample(make_posterior(law), 40_000, order=order, temperature=2.0, seed=8, max_batch=8192)
    assert chi_square_p(out.tokens, expected) > 0.01


def test_first_hitting_times_are_order_statistics(make_model, seen_sigmas):
    """t' = t u^{1/n}: before the j-th of n reveals (t'_j / t'_{j-1})^{n-j+1} is uniform."""
    model = make_model(time_conditioning=True, max_length=6)
    seen = seen_sigmas(model)
    sample(model, 4000, length=6, order="first_hitting", plan=1, seed=3)
    times = -torch.expm1(-torch.stack(seen)) / 0.999  # [6, B]
    assert (times.diff(dim=0) < 0).all()
    before = torch.cat((torch.ones(1, 4000), times[:-1]))
    for index in range(6):
        uniform = (times[index] / before[index]).clamp(0, 1) ** (6 - index)
        assert stats.kstest(uniform, "uniform").pvalue > 0.001


def test_first_hitting_is_the_limit_of_ancestral(model):
    """One set of uniforms names both; with steps so fine that no two reveals meet, the orders agree."""
    arguments = {"num_samples": 4, "length": 12, "seed": 5, "temperature": 0.0}
    limit = sample(model, order="first_hitting", **arguments)
    fine = sample(model, order="ancestral", steps=20_000, **arguments)
    assert torch.equal(limit.tokens, fine.tokens)
    assert limit.exact is False  # temperature 0
    assert sample(model, 1, length=4, order="first_hitting").exact
    assert not sample(model, 1, length=4, order="first_hitting", tokens_per_step=2).exact
    assert sample(model, 1, length=4).exact
    assert not sample(model, 1, length=4, order="confidence").exact


def test_first_hitting_takes_one_call_a_position(make_fixed):
    out = sample(make_fixed(torch.zeros(9, 3)), 50, order="first_hitting", seed=1)
    assert (out.network_calls == 9).all()
    assert out.rows_projected == 450
    out = sample(make_fixed(torch.zeros(9, 3)), 50, order="first_hitting", tokens_per_step=4, seed=1)
    assert (out.network_calls == 3).all()


def test_random_orders_are_uniform(make_fixed):
    out = sample(make_fixed(torch.zeros(4, 3)), 24_000, order="random", seed=2, history=True)
    positions = torch.stack([e.positions[e.sequence.argsort()] for e in out.history])  # [4, B]
    codes = (positions.T * 4 ** torch.arange(4)).sum(dim=1)
    counts = [
        int((codes == sum(p * 4**i for i, p in enumerate(o))).sum()) for o in itertools.permutations(range(4))
    ]
    assert sum(counts) == 24_000
    assert stats.chisquare(counts).pvalue > 0.01


def remask_chain(steps: int, eta: float) -> float:
    """Expected number of network draws of one position under "cap", from the two-state chain."""
    masked, draws = 1.0, 0.0
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        sigma = min(eta, 1.0, s / (1 - t) if t < 1 else 1.0)
        reveal = ((1 - s) - (1 - sigma) * (1 - t)) / t
        draws += masked * reveal
        masked = masked * (1 - reveal) + (1 - masked) * sigma
    assert masked == pytest.approx(0, abs=1e-12)
    return draws


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5])
def test_remasking_cap_follows_its_chain(make_fixed, eta):
    from loopmdm.sampling import Remasking

    out = sample(
        make_fixed(torch.zeros(5, 3)), 4000, steps=20, remask=Remasking("cap", eta), seed=4, history=True
    )
    draws = torch.zeros(4000, 5)
    state = torch.full((4000, 5), 3)
    share = []
    for event in out.history:
        revealed = event.tokens != 3
        draws.index_put_(
            (event.sequence[revealed], event.positions[revealed]),
            torch.ones(int(revealed.sum())),
            accumulate=True,
        )
        state[event.sequence, event.positions] = event.tokens
        share.append(float((state == 3).float().mean()))
    assert (out.tokens < 3).all() and torch.equal(state, out.tokens)
    expected = remask_chain(20, eta)
    assert abs(float(draws.mean()) - expected) < 4 * float(draws.std()) / math.sqrt(20_000) + 1e-9
    if len(share) == 20:  # the marginals are those of the process: 1 - alpha_s masked after each step
        for step, masked in enumerate(share):
            expected_share = 1 - (step + 1) / 20
            assert abs(masked - expected_share) < 4 * math.sqrt(max(expected_share, 0.01) / 20_000) + 1e-9


@pytest.mark.parametrize("kind", ["cap", "rescale", "conf", "loop"])
def test_remasking_leaves_no_mask_and_keeps_what_is_given(model, kind):
    mask = model.config.mask_token_id
    infill = torch.full((3, 12), mask)
    infill[:, ::4] = 2
    out = sample(model, infill=infill, steps=60, remask=kind, seed=2, history=True)
    assert (out.tokens != mask).all()
    assert (out.tokens[:, ::4] == 2).all()
    again = [int((event.tokens == mask).sum()) for event in out.history]
    assert sum(again) > 0
    for event in out.history:
        assert (event.confidence[event.tokens == mask] == 0).all()
        assert (event.positions % 4 != 0).all()
    alone = sample(model, infill=infill[1:2], steps=60, remask=kind, seed=2, sequence_ids=[1])
    assert torch.equal(alone.tokens[0], out.tokens[1])


def test_confident_tokens_are_masked_less(make_fixed):
    """ "conf": eta_i = softmax(-p): a token drawn with p = .1 goes e^.8 as often as one drawn with p = .9."""
    from loopmdm.sampling import Remasking

    logits = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.45, 0.45]]).log()
    out = sample(
        make_fixed(logits), 20_000, steps=2, remask=Remasking("conf"), seed=9, history=True, temperature=0.0
    )
    first, second = out.history
    early = torch.zeros(20_000, 2, dtype=torch.bool)
    early[first.sequence, first.positions] = True
    both = early.all(dim=1)
    # step 1 goes from t = 1/2 to 0, where sigma_max = 0: nothing is masked again
    assert (second.tokens != 3).all()
    assert 4500 < int(both.sum()) < 5500

    out = sample(make_fixed(logits), 40_000, steps=3, remask="conf", seed=9, history=True, temperature=0.0)
    early = torch.zeros(40_000, 2, dtype=torch.bool)
    early[out.history[0].sequence, out.history[0].positions] = True
    both = early.all(dim=1)
    second = out.history[1]
    again = torch.zeros(40_000, 2, dtype=torch.bool)
    gone = second.tokens == 3
    again[second.sequence[gone], second.positions[gone]] = True
    rates = again[both].double().mean(dim=0)
    p = torch.tensor([0.9, 0.45], dtype=torch.float64)  # greedy draws the most probable token
    expected = (-p).softmax(0)  # sigma_max = min(1, (1/3) / (1/3)) = 1
    assert int(both.sum()) > 3000
    assert torch.allclose(rates, expected, atol=4 * math.sqrt(0.25 / int(both.sum())))
