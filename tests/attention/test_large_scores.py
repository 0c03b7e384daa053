"""attention: scores at the edges of fp32."""

import math

import pytest
import torch
import torch.nn.functional as F

import loopmdm_kernels as lk
from tests.attention.cases import FLOAT, tensors

ON_ALL = pytest.mark.backends("reference", "best", "triton")


def exact_attention(q, k, v, mask=None):
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return torch.softmax(scores, dim=-1) @ v.double()


def large_heads(backend, length, size, head_dim=64):
    """Queries and keys whose scores are about size^2, the largest far above the others of its row."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 1, length, head_dim, generator=generator) for _ in range(3))
    return [t.to(backend.device) for t in (q * size, k * size, v)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.by_backend("length", reference=[1, 8, 63, 300, 1100], best=[1, 8, 63, 300, 1100], triton=[63])
@pytest.mark.parametrize("size", [30.0, 1e3, 3e4, 1e5, 1e9, 1e15, 1e18])
def test_attention_of_large_scores(backend, size, length, masked):
    q, k, v = large_heads(backend, length, size)
    mask = torch.arange(length) % 3 != 1 if masked else None
    mask = None if mask is None else mask.expand(2, length).contiguous().to(backend.device)
    out = lk.attention(q, k, v, key_mask=mask)
    # fp32 scores are off by 2^-20 of the largest or so: two keys closer than that may change places.
    scores = q.double() @ k.double().transpose(-1, -2) / 8
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    top = scores.topk(min(2, length), dim=-1).values
    clear = (top[..., 0] - top[..., -1] > 40 + 2.0**-18 * size**2) if length > 1 else top[..., 0] > -math.inf
    assert torch.isfinite(out).all()
    assert clear.any() or length > 100 or size < 1e3
    want = exact_attention(q, k, v, mask)
    torch.testing.assert_close(out[clear].double(), want[clear], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.by_backend("length", reference=[8, 300, 600], best=[8, 300, 600], triton=[8])
@pytest.mark.parametrize("size", [1e3, 3e4, 1e5, 1e9])
def test_gradients_of_attention_at_large_scores(backend, size, length, dtype):
    q, k, v = (t.to(dtype).requires_grad_() for t in large_heads(backend, length, size))
    out = lk.attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.isfinite(grad).all() for grad in grads)
    # One key takes all: a value's gradient counts the queries that chose it.
    scores = q.detach().double() @ k.detach().double().transpose(-1, -2)
    top = scores.topk(2, dim=-1)
    if bool((top.values[..., 0] - top.values[..., 1] > 400 + 2.0**-18 * size**2).all()):
        count = F.one_hot(top.indices[..., 0], length).sum(dim=-2).double()
        torch.testing.assert_close(grads[2][..., 0].double(), count, rtol=1e-3, atol=1e-3)


@pytest.mark.backends("best", "triton")  # PyTorch's own products overflow
def test_keys_that_are_masked_have_no_part_however_large(backend):
    q, k, v = tensors(backend, FLOAT, 1, 1, 40, 32)
    mask = torch.ones(1, 40, dtype=torch.bool, device=backend.device)
    mask[0, 20:] = False
    want = lk.attention(q, k, v, key_mask=mask)
    k[:, :, 20:] = 1e30 * k[:, :, 20:].sign()
    torch.testing.assert_close(lk.attention(q, k, v, key_mask=mask), want)
    far = lk.attention(q * 1e15, -k.abs() * 1e16, v, key_mask=mask)
    assert torch.isfinite(far).all()


@ON_ALL
def test_ties_of_large_scores_share_the_weight(backend):
    (v,) = tensors(backend, FLOAT, 1, 1, 4, 8, number=1)
    q = torch.full_like(v, 1e5)
    want = v.mean(dim=2, keepdim=True).expand_as(v)
    torch.testing.assert_close(lk.attention(q, q, v), want, rtol=1e-5, atol=1e-6)
