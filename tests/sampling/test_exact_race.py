"""E10: the draw is exact in distribution at a real vocabulary, where the reference's fp32 race is not."""

import numpy as np
import pytest
import torch
from scipy import stats

import loopmdm_kernels as lk
from loopmdm_kernels.philox import REVEAL_STREAM, uniform53
from loopmdm_kernels.testing import chi_square_p
from loopmdm_kernels.types import Head, RowRng

VOCAB = 50_257


def zipf(exponent=1.1):
    probs = np.arange(1, VOCAB + 1, dtype=np.float64) ** -exponent
    return np.random.default_rng(0).permutation(probs / probs.sum())


def draws(probs, sequences, seed, step=0):
    """One draw from `probs` for each sequence, through the public op."""
    log_probs = torch.from_numpy(np.log(probs)).float()
    head = Head(torch.ones(2), torch.zeros(len(probs), 2), log_probs, torch.zeros(1, 2, 2))
    zeros = torch.zeros_like(sequences)
    tokens = []
    for part in sequences.split(50_000):
        rng = RowRng(seed, part, zeros[: len(part)] + step, zeros[: len(part)])
        tokens.append(lk.sample_rows(torch.zeros(1, 1, 2), head, zeros[: len(part)], rng).token)
    return torch.cat(tokens)


@pytest.mark.slow
def test_e10_a_million_draws():
    probs = zipf()
    counts = np.bincount(draws(probs, torch.arange(1_000_000), seed=2).numpy(), minlength=VOCAB)
    assert chi_square_p(counts, probs) > 0.01


def test_e10_one_step_that_reveals_one_in_a_thousand():
    """The law of a whole step: the mask stays with probability 0.999, token v comes with 1e-3 p_v."""
    probs, num, steps = zipf(), 1_000_000, 1000
    uniform = uniform53(5, torch.zeros(num, dtype=torch.int64), 0, REVEAL_STREAM, torch.arange(num))
    revealed = ((uniform * steps).floor() == 0).nonzero().squeeze(1)
    assert stats.binomtest(len(revealed), num, 1 / steps).pvalue > 0.01
    counts = np.bincount(draws(probs, revealed, seed=5).numpy(), minlength=VOCAB)
    assert (
        chi_square_p(np.append(counts, num - len(revealed)), np.append(probs / steps, 1 - 1 / steps)) > 0.01
    )


def reference_race(probs, num):
    """MDLM's draw: argmax of q / (1e-10 - log(u + 1e-10)) with fp32 uniforms."""
    q = torch.from_numpy(probs).float()
    tokens = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(num // 500):
        uniform = torch.rand(500, len(probs), generator=generator)
        tokens.append((q / (1e-10 - (uniform.add_(1e-10)).log_())).argmax(-1))
    return torch.cat(tokens)


def test_e10_rare_tokens_survive_where_the_reference_race_drops_them():
    """Fifty thousand tokens of 2^-26 each: a uniform with 24 bits gives them 0.066 of their share."""
    num = 40_000
    probs = np.full(VOCAB, 2.0**-26)
    probs[0] = 1 - probs[1:].sum()
    share = 1 - probs[0]
    ours = int((draws(probs, torch.arange(num), seed=8) != 0).sum())
    naive = int((reference_race(probs, num) != 0).sum())
    assert stats.binomtest(ours, num, share).pvalue > 0.01
    assert stats.binomtest(naive, num, 0.066 * share).pvalue > 0.01
    assert naive < 0.3 * ours
