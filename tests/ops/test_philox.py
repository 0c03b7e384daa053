"""The random numbers of the reference: published answers, uniformity, the tail of the race."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from loopmdm_kernels.philox import dropout_keep, philox4x32, race_times, uniform53

# Known answers of philox4x32-10 published with Random123: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox4x32(key[0] | key[1] << 32, *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == expected


REFINED = (3, 1057, 8265, 20)  # seed, sequence, token, high word of the counter (token // 4, 0, 0, sequence)


def zeros(num):
    return torch.zeros(num, dtype=torch.int64)


def test_race_times_are_exponential():
    times = race_times(1, torch.arange(1000), zeros(1000), zeros(1000), 1000, torch.float64)
    assert stats.kstest(times.flatten().numpy(), "expon").pvalue > 0.01
    correlation = np.corrcoef(times[:, :-1].flatten().numpy(), times[:, 1:].flatten().numpy())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(times.numel())


def test_fp32_times_keep_their_relative_precision():
    rows, vocab, seed = 400, 5000, 3
    times = race_times(seed, torch.arange(rows), zeros(rows), zeros(rows), vocab, torch.float32)
    exact = race_times(seed, torch.arange(rows), zeros(rows), zeros(rows), vocab, torch.float64)
    torch.testing.assert_close(times.double()[times < 1], exact[times < 1], rtol=1e-6, atol=0)
    row, token = divmod(int(exact.argmin()), vocab)
    counter = (torch.tensor([token // 4]), torch.tensor([0]), torch.tensor([0]), torch.tensor([row]))
    high = int(philox4x32(seed, *counter)[token % 4])
    low = int(philox4x32(seed, counter[0] | 1 << 31, *counter[1:])[token % 4])
    uniform = (high + (low + 0.5) / 2**32 if high < 256 else high + 0.5) / 2**32
    assert float(exact.min()) == pytest.approx(-math.log1p(-uniform), rel=1e-12)


def test_time_below_the_high_words_step():
    """A high word below 2^8 is rare (2^-24); this one was found by search."""
    seed, sequence, token, high_expected = REFINED
    high = int(philox4x32(seed, *(torch.tensor([c]) for c in (token // 4, 0, 0, sequence)))[token % 4])
    assert high == high_expected < 256
    low = int(
        philox4x32(seed, *(torch.tensor([c]) for c in (token // 4 | 1 << 31, 0, 0, sequence)))[token % 4]
    )
    time = race_times(seed, torch.tensor([sequence]), zeros(1), zeros(1), token + 1, torch.float32)[0, token]
    assert float(time) == pytest.approx((high + (low + 0.5) / 2**32) / 2**32, rel=1e-6)
    assert low != 0


def test_uniform53():
    values = uniform53(7, torch.arange(100_000), 1, 2, 3).numpy()
    assert values.min() >= 0 and values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_dropout_mask_depends_on_every_name():
    shape, device = torch.Size((7, 33)), torch.device("cpu")
    base = dropout_keep(1, 2, 0, shape, 0.5, device)
    assert torch.equal(base, dropout_keep(1, 2, 0, shape, 0.5, device))
    for other in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not torch.equal(base, dropout_keep(*other, shape, 0.5, device))
    big = dropout_keep(1, 0, 0, torch.Size((100_000,)), 0.1, device)
    assert abs(big.float().mean().item() - 0.9) < 4 * math.sqrt(0.09 / 1e5)
