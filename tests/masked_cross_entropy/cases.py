"""Inputs of masked_cross_entropy, and what its tests compare."""

from __future__ import annotations

import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import (
    LEAVES,
    assert_cross_entropy,
    cross_entropy_inputs,
    cross_entropy_results,
)
from tests.near import assert_near

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
# Leaves of which gradients are asked for.
ALONE = [(name,) for name in LEAVES]
PAIRS = [("hidden", "norm"), ("bias", "modulation"), ("hidden", "bias"), ("norm", "weight")]
# (D, V, R) for which no tile is full: interpreted and emulated kernels are slow.
USUAL = {"triton": (36, 301, 33), "cuda": (72, 301, 33), "gpu": (72, 301, 33)}


def case(backend, dtype=None, size=None, **options):
    """The arguments of the op in size (D, V, R)."""
    size = size or USUAL.get(backend.kind, (48, 389, 40))
    on_hopper = backend.name == "cuda"
    dtype, length = dtype or (BF16 if on_hopper else FLOAT), 50 if on_hopper else 11
    return cross_entropy_inputs(*size, dtype, scale=5.0, length=length, device=backend.device, **options)


def run(inputs, **options):
    return cross_entropy_results(lk.masked_cross_entropy, *inputs, **options)


def check(backend, inputs, **options):
    """Values and gradients by the tolerance rule."""
    # The reference keeps the gradients of the logits in fp32; as operands of WGMMA they are bf16.
    factor = 3.0 if backend.name == "cuda" else 2.0
    exact = 1e-7 if backend.name == "cpu" else 1e-6
    op = lk.masked_cross_entropy
    assert_cross_entropy(op, inputs, total_rtol=exact, gradient_factor=factor, **options)
    if backend.kind == "reference":
        dtype = options.get("compute_dtype") or inputs[0]["weight"].dtype
        oracle = cross_entropy_results(op, *inputs, kind=torch.float64)
        for name, value in run(inputs, **options).items():
            assert_near(value, oracle[name], dtype, name)


def assert_same(a, b):
    """Every value of `a` has the bits that it has in `b`."""
    for name in a:
        assert torch.equal(a[name], b[name]), name
