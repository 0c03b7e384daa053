"""Scores, rows and variances at the edges of fp32; over every backend here."""

import math

import pytest
import torch
import torch.nn.functional as F

import loopmdm_kernels as lk
from loopmdm_kernels.testing import looped_inputs

pytestmark = pytest.mark.backends("reference", "best")


def exact_attention(q, k, v, mask=None):
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return torch.softmax(scores, dim=-1) @ v.double()


def large_heads(length, size, head_dim=64):
    """Queries and keys whose scores are about size^2, the largest far above the others of its row."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 1, length, head_dim, generator=generator) for _ in range(3))
    return q * size, k * size, v


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 8, 63, 300, 1100])
@pytest.mark.parametrize("size", [30.0, 1e3, 3e4, 1e5, 1e9, 1e15, 1e18])
def test_attention_of_large_scores(backend, size, length, masked):
    q, k, v = large_heads(length, size)
    mask = torch.arange(length) % 3 != 1 if masked else None
    mask = None if mask is None else mask.expand(2, length).contiguous()
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
@pytest.mark.parametrize("length", [8, 300, 600])
@pytest.mark.parametrize("size", [1e3, 3e4, 1e5, 1e9])
def test_gradients_of_attention_at_large_scores(backend, size, length, dtype):
    q, k, v = (t.to(dtype).requires_grad_() for t in large_heads(length, size))
    out = lk.attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.isfinite(grad).all() for grad in grads)
    # One key takes all: a value's gradient counts the queries that chose it.
    scores = q.detach().double() @ k.detach().double().transpose(-1, -2)
    top = scores.topk(2, dim=-1)
    if bool((top.values[..., 0] - top.values[..., 1] > 400 + 2.0**-18 * size**2).all()):
        count = F.one_hot(top.indices[..., 0], length).sum(dim=-2).double()
        torch.testing.assert_close(grads[2][..., 0].double(), count, rtol=1e-3, atol=1e-3)


def test_keys_that_are_masked_have_no_part_however_large():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 32, generator=generator) for _ in range(3))
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 20:] = False
    want = lk.attention(q, k, v, key_mask=mask)
    k[:, :, 20:] = 1e30 * k[:, :, 20:].sign()
    torch.testing.assert_close(lk.attention(q * 1.0, k, v, key_mask=mask), want)
    far = lk.attention(q * 1e15, -k.abs() * 1e16, v, key_mask=mask)
    assert torch.isfinite(far).all()


def test_ties_of_large_scores_share_the_weight(backend):
    q = torch.full((1, 1, 4, 8), 1e5)
    v = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    want = v.mean(dim=2, keepdim=True).expand_as(v)
    torch.testing.assert_close(lk.attention(q, q, v), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_looped_blocks_with_large_scores(dtype, recompute):
    inputs = looped_inputs(length=24)
    blocks = [b._replace(qkv=torch.cat((b.qkv[:64] * 3e4, b.qkv[64:]))) for b in inputs.blocks]
    inputs = inputs._replace(blocks=blocks).to(dtype, requires_grad=True)
    out = lk.looped_blocks(
        inputs.x, inputs.blocks, inputs.modulation, 2, num_heads=inputs.num_heads,
        rotary=inputs.rotary, recompute=recompute,
    )  # fmt: skip
    assert torch.isfinite(out).all()
    grads = torch.autograd.grad(out.sum(), list(inputs.leaves().values()))
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("hidden_size", [16, 100, 768])
def test_a_constant_stream_goes_through_the_blocks_as_in_float64(backend, hidden_size):
    inputs = looped_inputs(hidden=hidden_size, num_heads=2, length=5)
    inputs = inputs._replace(x=torch.full_like(inputs.x, 40.7))
    narrow = inputs.to(torch.float32)
    wide = narrow._replace(
        x=narrow.x.double(), blocks=[type(b)(*(w.double() for w in b)) for b in narrow.blocks],
        modulation=narrow.modulation.double(),
        rotary=type(narrow.rotary)(*(a.double() for a in narrow.rotary)),
    )  # fmt: skip

    def run(i):
        return lk.looped_blocks(i.x, i.blocks, i.modulation, 1, num_heads=2, rotary=i.rotary)

    with lk.use_backend("reference"):
        want = run(wide)
    torch.testing.assert_close(run(narrow).double(), want, rtol=0, atol=1e-4)
