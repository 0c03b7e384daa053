"""attention in Triton: values and gradients, masks, angles, strides, extreme scores."""

import pytest
import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.testing import assert_matches_oracle
from loopmdm_kernels.types import Rotary

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def triton(*args, **options):
    with lk.use_backend("triton"):
        return lk.attention(*args, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_mask(batch: int, length: int) -> Tensor:
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, length // 2] = True
    return mask


def angles(length: int, head_dim: int) -> Rotary:
    frequency = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return Rotary(angle.cos(), angle.sin())


def run(op, qkv, grad, **options):
    """Output and gradients for q, k, v that are strided views of [B, L, 3, H, K]."""
    leaf = qkv.clone().requires_grad_()
    out = op(*(t.transpose(1, 2) for t in leaf.unbind(2)), **options)
    out.backward(grad.transpose(1, 2))
    return [out.detach(), *leaf.grad.unbind(2)]


def check(device, dtype, batch, heads, length, head_dim, *, scale=1.0, key_mask=None, rotary=None):
    qkv = (normal(batch, length, 3, heads, head_dim) * scale).to(device, dtype)
    grad = normal(batch, length, heads, head_dim, seed=2).to(device, dtype)
    options = {
        "key_mask": None if key_mask is None else key_mask.to(device),
        "rotary": None if rotary is None else Rotary(*(a.to(device) for a in rotary)),
    }
    results = [
        run(op, qkv.to(kind), grad.to(kind), **options)
        for op, kind in (
            (triton, dtype),
            (reference.attention, dtype),
            (reference.attention, torch.float64),
        )
    ]
    for name, out, baseline, oracle in zip(("out", "q", "k", "v"), *results, strict=True):
        assert_matches_oracle(out, baseline, oracle, name=name)


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64])
def test_values_and_gradients(device, dtype, head_dim):
    check(device, dtype, 1, 2, 45, head_dim, rotary=angles(45, head_dim))


@pytest.mark.parametrize(("length", "head_dim"), [(1, 128), (37, 3), (70, 20), (33, 96)])
def test_sizes(device, length, head_dim):
    check(device, torch.bfloat16, 1, 1, length, head_dim)


@DTYPES
def test_masks(device, dtype):
    check(device, dtype, 2, 1, 70, 32, key_mask=random_mask(2, 70), rotary=angles(70, 32))


def test_a_block_of_masked_keys(device):
    mask = torch.zeros(1, 150, dtype=torch.bool)
    mask[0, 140] = mask[0, 3] = True
    check(device, torch.float32, 1, 1, 150, 16, key_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scores(device, dtype):
    """Scores in the thousands: one key wins, nothing overflows; and the largest come last."""
    check(device, dtype, 1, 1, 90, 32, scale=30.0)
    q, k, v = (normal(1, 1, 90, 16, seed=s).abs() for s in range(3))
    k = k * torch.linspace(0, 12, 90, dtype=torch.float64)[:, None]
    q, k, v = (t.to(device, dtype) for t in (q, k, v))
    oracle = reference.attention(q.double(), k.double(), v.double())
    assert_matches_oracle(triton(q, k, v), reference.attention(q, k, v), oracle)


def test_masked_keys_may_hold_anything_finite(device):
    mask = random_mask(1, 40).to(device)
    q, k, v, grad = (normal(1, 2, 40, 16, seed=s).to(device, torch.float32) for s in range(4))
    results = []
    for fill in (0.0, 1e4):
        leaves = [q.clone(), *(t.masked_fill(~mask[:, None, :, None], fill) for t in (k, v))]
        out = triton(*(leaf.requires_grad_() for leaf in leaves), key_mask=mask)
        out.backward(grad)
        results.append([out, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_columns_far_apart(device):
    q, k, v = (normal(1, 2, 16, 40, seed=s).to(device, torch.float32).mT for s in range(3))
    assert q.stride(-1) != 1
    expected = triton(*(t.contiguous() for t in (q, k, v)))
    assert torch.equal(triton(q, k, v), expected)


def test_heads_and_batch_do_not_matter(device):
    q, k, v = (normal(3, 2, 33, 16, seed=s).to(device, torch.bfloat16) for s in range(3))
    together = triton(q, k, v)
    for b in range(3):
        alone = triton(*(t[b : b + 1, 1:] for t in (q, k, v)))
        assert torch.equal(alone[0, 0], together[b, 1])


def test_what_it_cannot_do(device):
    q = torch.zeros(1, 1, 4, 257, device=device)
    with pytest.raises(RuntimeError, match="the head size may be 256, got 257"):
        triton(q, q, q)
