"""The draws follow the distribution: chi-square tests of the compiled race."""

import numpy as np
import pytest
import torch
from scipy import stats

from loopmdm_kernels.cpu.sample_rows import sample_rows
from loopmdm_kernels.testing import chi_square_p
from loopmdm_kernels.types import Head, RowRng


def draws(log_probs, num, seed, temperature=1.0):
    """Counts of `num` draws in one call: one hidden row, `num` sequences."""
    vocab_size = log_probs.shape[0]
    head = Head(torch.ones(2), torch.zeros(vocab_size, 2), log_probs.float(), torch.zeros(1, 2, 2))
    zeros = torch.zeros(num, dtype=torch.int64)
    rng = RowRng(seed, torch.arange(num), zeros, zeros)
    token = sample_rows(torch.zeros(1, 1, 2), head, zeros, rng, temperature=temperature).token
    return np.bincount(token.numpy(), minlength=vocab_size)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_small_vocabulary(isa, temperature):
    log_probs = torch.log_softmax(torch.linspace(-4, 4, 10, dtype=torch.float64), 0)
    counts = draws(log_probs, 300_000, seed=5, temperature=temperature)
    assert chi_square_p(counts, torch.softmax(log_probs / temperature, 0).numpy()) > 1e-3


def test_rare_tokens():
    """Two thousand tokens of probability 1e-6 each together come up as often as they should."""
    probs = np.full(2001, 1e-6)
    probs[1000] = 1 - 2000e-6
    counts = draws(torch.from_numpy(np.log(probs)), 500_000, seed=9)
    rare = 500_000 - int(counts[1000])
    assert stats.binomtest(rare, 500_000, 2000e-6).pvalue > 1e-3
    low, high = counts[:1000].sum(), counts[1001:].sum()
    assert stats.binomtest(int(low), int(low + high), 0.5).pvalue > 1e-3
