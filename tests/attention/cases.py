"""Inputs of attention, and what its outputs and gradients are compared with."""

from __future__ import annotations

import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import assert_matches_oracle, reference
from loopmdm_kernels.testing.tolerance import luck_factor
from loopmdm_kernels.types import Rotary
from tests.near import assert_near

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DOUBLE = torch.float64
NAMES = ("out", "q", "k", "v")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def tensors(backend, dtype, *shape, number=3):
    """q, k, v [B, H, L, K], and a gradient if there are to be four."""
    return [normal(*shape, seed=seed).to(backend.device, dtype) for seed in range(number)]


def random_mask(backend, batch, length):
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, length // 2] = True
    return mask.to(backend.device)


def angles(backend, length, head_dim):
    frequency = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=DOUBLE) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=DOUBLE), frequency).to(backend.device)
    return Rotary(angle.cos(), angle.sin())


def interleaved(backend, dtype, batch, heads, length, head_dim):
    """[B, L, 3, H, K], of which q, k and v are strided views, and a gradient [B, L, H, K]."""
    qkv = normal(batch, length, 3, heads, head_dim), normal(batch, length, heads, head_dim, seed=2)
    return [t.to(backend.device, dtype) for t in qkv]


def run(qkv, grad, op=lk.attention, **options):
    """The output [B, H, L, K] and the gradients of q, k, v [B, L, H, K]."""
    leaf = qkv.detach().clone().requires_grad_()
    out = op(*(t.transpose(1, 2) for t in leaf.unbind(2)), **options)
    out.backward(grad.transpose(1, 2))
    return [out.detach(), *leaf.grad.unbind(2)]


def check(backend, dtype, size, *, scale=1.0, key_mask=None, rotary=None, names=NAMES):
    """By the tolerance rule; on the CPU its luck counts queries, whose numbers share the errors of scores."""
    qkv, grad = interleaved(backend, dtype, *size)
    options = {"key_mask": key_mask, "rotary": rotary}
    out = run(qkv * scale, grad, **options)
    baseline = run(qkv * scale, grad, reference.attention, **options)
    oracle = run((qkv * scale).to(DOUBLE), grad.to(DOUBLE), reference.attention, **options)
    factor = luck_factor(size[0] * size[1] * size[2]) if backend.name == "cpu" else 2.0
    for name, *values in zip(NAMES, out, baseline, oracle, strict=True):
        if name in names:
            assert_matches_oracle(*values, name=name, factor=factor)
            # Scores grow with scale^2, and with them what rounding them does to their exponentials.
            assert_near(values[0], values[2], dtype, name, units=16 * max(1.0, scale) ** 2)


def assert_same(one, other):
    for name, a, b in zip(NAMES, one, other, strict=True):
        assert torch.equal(a, b), name
