"""The tolerance rule itself: strict on many numbers, fair on few."""

import pytest
import torch

from loopmdm_kernels.testing import assert_matches_oracle
from loopmdm_kernels.testing.tolerance import errors_that_count, luck_factor


def test_twice_beyond_some_hundred_numbers():
    factors = [luck_factor(count) for count in (8, 16, 32, 64, 110, 111, 10**6)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] < 7
    assert factors[-3] > factors[-2] == factors[-1] == 2.0


def test_numbers_that_count():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(30_000, generator=generator, dtype=torch.float64)
    assert errors_that_count(torch.full((50,), -3.0, dtype=torch.float64)) == pytest.approx(50)
    assert errors_that_count(normal) == pytest.approx(10_000, rel=0.05)
    normal[7] = 1e6
    normal[8] = torch.nan
    assert errors_that_count(normal) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("count", [8, 16, 64, 200])
def test_equally_good_computations_rarely_differ_by_more(count):
    generator = torch.Generator().manual_seed(count)
    largest = torch.randn(2, 20_000, count, generator=generator, dtype=torch.float64).abs().amax(-1)
    exceeded = int((largest[0] > luck_factor(count) * largest[1]).sum())
    assert exceeded <= 10  # 2 are expected


@pytest.mark.parametrize(("factor", "passes"), [(1.9, True), (2.1, False)])
def test_large_tensors_are_held_to_twice(factor, passes):
    generator = torch.Generator().manual_seed(1)
    oracle, error = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    baseline, out = (oracle + 0.1 * error).float(), (oracle + factor * 0.1 * error).float()
    if passes:
        return assert_matches_oracle(out, baseline, oracle)
    with pytest.raises(AssertionError, match=r"output: error .*, baseline's .*, bound"):
        assert_matches_oracle(out, baseline, oracle)
