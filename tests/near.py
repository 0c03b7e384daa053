"""A bound that does not measure by plain PyTorch, for tests in which plain PyTorch is what is tested."""

from __future__ import annotations

import torch

from loopmdm_kernels import backends
from loopmdm_kernels.testing.tolerance import max_error


def assert_near(value, oracle, dtype, name="output", *, units=64.0):
    """Of the reference: an error of at most `units` rounding steps of `dtype` at float64's largest number."""
    if backends.forced() != ("reference",):
        return
    finite = oracle[oracle.isfinite()]
    allowed = units * torch.finfo(dtype).eps * float(finite.abs().max()) if finite.numel() else 0.0
    error = max_error(value, oracle)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
