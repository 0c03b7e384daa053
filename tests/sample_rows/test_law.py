"""sample_rows: draws follow the law of the row, whole or restricted to its most probable tokens."""

import numpy as np
import pytest
import torch
from scipy import stats

import loopmdm_kernels as lk
from loopmdm_kernels.testing import chi_square_p, reference
from tests.sample_rows.cases import counts, plain_case

# Emulation and interpreter are slow, so that their few draws are held to the reference's; a GPU is not.
MANY = pytest.mark.by_backend(
    "num", reference=[200_000], cpu=[300_000], triton=[300], cuda=[1200], gpu=[1_000_000]
)


def hold_to_reference(backend, log_probs, num, *, seed, **options):
    """The same tokens for the same names of random numbers, whose law is that of the reference."""
    inputs = plain_case(backend, log_probs.float(), num, seed=seed)
    tokens = reference.sample_rows(*inputs, **options).token
    assert torch.equal(lk.sample_rows(*inputs, **options).token, tokens) and len(tokens.unique()) > 3


@MANY
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_small_vocabulary(backend, num, temperature):
    log_probs = torch.log_softmax(torch.linspace(-4, 4, 10, dtype=torch.float64), 0)
    if backend.emulated:
        hold_to_reference(backend, log_probs, num, seed=5, temperature=temperature)
    drawn = counts(backend, log_probs, num, seed=5, temperature=temperature)
    assert chi_square_p(drawn, torch.softmax(log_probs / temperature, 0).numpy()) > 0.01


@MANY
def test_uneven_vocabulary(backend, num):
    log_probs = torch.log_softmax(torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, -6.0, 2.0], dtype=torch.float64), 0)
    if backend.emulated:
        hold_to_reference(backend, log_probs, num, seed=11)
    assert chi_square_p(counts(backend, log_probs, num, seed=11), log_probs.exp().numpy()) > 0.01


@pytest.mark.backends("best")
def test_rare_tokens(backend):
    """Two thousand tokens of probability 1e-6 each together come up as often as they should."""
    probs = np.full(2001, 1e-6)
    probs[1000] = 1 - 2000e-6
    drawn = counts(backend, torch.from_numpy(np.log(probs)), 500_000, seed=9)
    rare = 500_000 - int(drawn[1000])
    assert stats.binomtest(rare, 500_000, 2000e-6).pvalue > 1e-3
    low, high = drawn[:1000].sum(), drawn[1001:].sum()
    assert stats.binomtest(int(low), int(low + high), 0.5).pvalue > 1e-3


@pytest.mark.by_backend("num", reference=[20_000], cpu=[20_000], cuda=[1000])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 0.7}, [0.625, 0.375]),
        ({"top_p": 0.45}, [1.0]),
        ({"top_p": 0.951}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 3}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
        ({"top_k": 1}, [1.0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375]),  # .526 and .316 of the three reach .8
        ({"top_k": 2, "temperature": 0.5}, [25 / 34, 9 / 34]),
    ],
    ids=str,
)
def test_restricted_draws(backend, num, options, expected):
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    drawn = counts(backend, log_probs, num, seed=5, **options)
    assert drawn[len(expected) :].sum() == 0
    if len(expected) > 1:
        assert chi_square_p(drawn[: len(expected)], np.array(expected)) > 0.01


# The other backends make the logits; what is kept of them, the reference says.
WITH_A_KERNEL = pytest.mark.backends("reference", "cpu")


@WITH_A_KERNEL
def test_restricted_draws_take_the_lowest_ids_on_ties(backend):
    drawn = counts(backend, torch.zeros(7), 3000, seed=5, top_k=3)
    assert drawn[3:].sum() == 0 and (drawn[:3] > 900).all()
    drawn = counts(backend, torch.zeros(8), 3000, seed=5, top_p=0.49)
    assert drawn[4:].sum() == 0 and (drawn[:4] > 650).all()


@WITH_A_KERNEL
def test_a_restriction_to_everything_is_none(backend):
    """The race among some tokens uses the numbers of the race among all."""
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(1))
    inputs = plain_case(backend, logits.log_softmax(0), 500)
    full = lk.sample_rows(*inputs)
    for options in ({"top_k": 1500}, {"top_p": 1 - 1e-7}):
        some = lk.sample_rows(*inputs, **options)
        assert torch.equal(some.token, full.token)
        torch.testing.assert_close(some.entropy, full.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.by_backend("num", reference=[600], cpu=[3000])
def test_a_nucleus_of_more_than_a_thousand_tokens(backend, num):
    token = lk.sample_rows(*plain_case(backend, torch.zeros(4000), num), top_p=0.5).token
    assert token.max() < 2000 + 2  # to the rounding of sums of 2000 probabilities
    assert token.unique().numel() > num * 1400 / 3000
