"""The tolerance rule: at most twice the error of plain PyTorch in the same dtype, plus one rounding step.

Errors are compared by their largest, and the largest of few is a matter of luck: plain PyTorch may be right
to a fraction of a rounding step in all of a dozen numbers, and on another processor it is not. So below some
hundred numbers twice becomes more, by as much as two equally good computations can differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FACTOR = 2.0
_LUCKY, _ORDINARY = 1e-4, 0.95  # how often the largest error is smaller: than the baseline's, than ours
_FEWEST = 8  # or the rule would allow anything


def errors_that_count(oracle: Tensor) -> float:
    """How many numbers the largest error is drawn from, if errors grow with them: (sum x^2)^2 / sum x^4.

    All of them if they are of one size, a third if they are normal variates, one if it exceeds all others.
    """
    squares = oracle[oracle.isfinite()].square()
    total = float(squares.sum())
    return total**2 / float(squares.square().sum()) if total > 0 else 1.0


def luck_factor(count: float) -> float:
    """2, or more for so few numbers that chance alone explains more.

    Errors of two computations are taken as `count` normal variates of one variance each. Of the largest,
    this is the ratio of an ordinary value to one that is undercut once in ten thousand times. It is 6.7 for 8
    numbers, 3.8 for 16, 2.2 for 64, and 2 from 111 on.
    """

    def largest(probability: float) -> float:
        single = torch.tensor(probability ** (1.0 / max(count, _FEWEST)), dtype=torch.float64)
        return math.sqrt(2.0) * float(torch.erfinv(single))

    return max(_FACTOR, largest(_ORDINARY) / largest(_LUCKY))


def rounding_step(oracle: Tensor, dtype: torch.dtype) -> float:
    """One rounding step of the data in `dtype`: twice the largest change of adding and removing 0.3."""
    rounded = oracle.to(dtype)
    change = (rounded + 0.3 - 0.3) - rounded
    finite = change[change.isfinite()]
    return 2.0 * float(finite.abs().max()) if finite.numel() else 0.0


def max_error(out: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference where the oracle is not NaN (equal infinities differ by 0)."""
    differs = (out.double() != oracle) & ~oracle.isnan()
    return float((out.double() - oracle)[differs].abs().max()) if bool(differs.any()) else 0.0


def assert_matches_oracle(
    out: Tensor, baseline: Tensor, oracle: Tensor, *, name: str = "output", factor: float = 2.0
) -> None:
    """Assert max|out - oracle| <= factor * max|baseline - oracle| + rounding_step; NaN at the same places.

    Of few numbers the factor is at least `luck_factor(errors_that_count(oracle))`.

    Args:
        out: what is tested.
        baseline: plain PyTorch in the dtype of `out`, on the same input.
        oracle: float64.
    """
    if oracle.dtype != torch.float64:
        raise TypeError(f"oracle: got {oracle.dtype}, expected float64")
    if not out.shape == baseline.shape == oracle.shape:
        raise AssertionError(f"{name}: shapes {out.shape}, {baseline.shape}, {oracle.shape} differ")
    oracle = oracle.to(out.device)
    if not torch.equal(out.isnan(), oracle.isnan()):
        raise AssertionError(f"{name}: NaN at other places than in the oracle")
    error, allowed = max_error(out, oracle), max_error(baseline.to(out.device), oracle)
    factor = max(factor, luck_factor(errors_that_count(oracle)))
    bound = factor * allowed + rounding_step(oracle, out.dtype)
    if not error <= bound:
        raise AssertionError(f"{name}: error {error:.3e}, baseline's {allowed:.3e}, bound {bound:.3e}")
