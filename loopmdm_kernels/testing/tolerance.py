"""The tolerance rule: at most twice the error of plain PyTorch in the same dtype, plus one rounding step."""

from __future__ import annotations

import torch
from torch import Tensor


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
    bound = factor * allowed + rounding_step(oracle, out.dtype)
    if not error <= bound:
        raise AssertionError(f"{name}: error {error:.3e}, baseline's {allowed:.3e}, bound {bound:.3e}")
