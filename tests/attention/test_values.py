"""attention: values and gradients against float64, masks, angles, and scores far apart."""

import math
import random

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.reference.attention import apply_rotary
from loopmdm_kernels.testing import assert_matches_oracle, reference
from loopmdm_kernels.types import Rotary
from tests.attention.cases import (
    BF16,
    DOUBLE,
    FLOAT,
    HALF,
    angles,
    check,
    interleaved,
    normal,
    random_mask,
    run,
    tensors,
)
from tests.near import assert_near

pytestmark = pytest.mark.backends("reference", "cpu", "triton")


def drawn_sizes():
    for head_dim in (2, 20, 32, 48, 64, 80, 128):
        draw = random.Random(head_dim)
        for index in range(4):
            length, batch, heads = draw.randint(1, 200), draw.randint(1, 2), draw.randint(1, 3)
            yield batch, heads, length, head_dim, "rotary" if index % 2 else ""


# (B, H, L, K) around the widths of vectors, panels and blocks of keys; short sequences with each head apart.
SHORT = (2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 65)
CPU_SIZES = [
    *drawn_sizes(),
    *((2, 2, length, 32, "masked rotary") for length in (5, 64, 130)),
    *((2, 3, n, k, "rotary" if n % 2 else "") for n in SHORT for k in (6, 64)),
    *((1, 2, length, head_dim, "") for length, head_dim in ((37, 3), (70, 33), (20, 129))),
    (1, 1, 600, 64, "masked"),
    (1, 1, 1030, 64, ""),
]
TRITON_SIZES = [(1, 2, 45, 32, "rotary"), (1, 2, 45, 64, "rotary"), (2, 1, 70, 32, "masked rotary")]
BF16_SIZES = [(1, 1, *size, "") for size in ((1, 128), (37, 3), (70, 20), (33, 96))]


def of(sizes, dtypes):
    return [(size, dtype) for size in sizes for dtype in dtypes]


@pytest.mark.by_backend(
    "given",
    reference=of(TRITON_SIZES, (FLOAT, BF16, HALF)),
    cpu=of(CPU_SIZES, (FLOAT, BF16)),
    triton=of(TRITON_SIZES, (FLOAT, BF16, HALF)) + of(BF16_SIZES, (BF16,)),
)
def test_values_and_gradients(backend, given):
    (*size, options), dtype = given
    batch, _, length, head_dim = size
    mask = random_mask(backend, batch, length) if "masked" in options else None
    rotary = angles(backend, length, head_dim) if "rotary" in options else None
    check(backend, dtype, size, key_mask=mask, rotary=rotary)


FEW = pytest.mark.by_backend("dtype", reference=[FLOAT, BF16], cpu=[FLOAT, BF16], triton=[FLOAT, BF16])


def test_a_block_of_masked_keys(backend):
    mask = torch.zeros(1, 150, dtype=torch.bool, device=backend.device)
    mask[0, 140] = mask[0, 3] = True
    check(backend, FLOAT, (1, 1, 150, 16), key_mask=mask)


def test_one_token(backend, dtype):
    """Its output is its value; nothing depends on queries and keys. All but for rounding."""
    eps = torch.finfo(FLOAT).eps
    qkv, grad = interleaved(backend, dtype, 3, 2, 1, 20)
    out, of_q, of_k, of_v = run(qkv, grad)
    torch.testing.assert_close(out.transpose(1, 2), qkv[:, :, 2], rtol=2 * eps, atol=0)
    torch.testing.assert_close(of_v, grad, rtol=2 * eps, atol=0)
    for name, zero in (("q", of_q), ("k", of_k)):
        assert zero.abs().max() <= 8 * eps * qkv.abs().max(), name


@FEW
def test_later_blocks_have_the_largest_scores(backend, dtype):
    """The running maximum rises over blocks of keys, so sums are scaled down on the way."""
    length = 90 if backend.emulated else 1100
    q, k, v = normal(3, 1, 1, length, 16)
    q, k = q.abs(), k.abs() * torch.linspace(0, 12, length, dtype=DOUBLE)[:, None]
    q, k, v = (t.to(backend.device, dtype) for t in (q, k, v))
    oracle = reference.attention(q.double(), k.double(), v.double())
    out = lk.attention(q, k, v)
    assert_matches_oracle(out, reference.attention(q, k, v), oracle)
    assert_near(out, oracle, dtype)


@FEW
def test_extreme_scores(backend, dtype):
    """Scores in the thousands: one key wins, nothing overflows."""
    check(backend, dtype, (1, 1, 90, 32) if backend.emulated else (1, 2, 300, 64), scale=30.0)
    q, k, v = tensors(backend, dtype, 1, 1, 90, 64)
    out = lk.attention(q * 300, k * 300, v)
    assert out.isfinite().all()
    winner = (q.double() @ k.double().mT).argmax(-1)[0, 0]
    torch.testing.assert_close(out[0, 0], v[0, 0, winner])


@FEW
@pytest.mark.by_backend("length", cpu=[20, 90, 200, 256], triton=[20])  # of plain PyTorch they are noise
def test_gradients_where_few_keys_win(backend, dtype, length):
    """The gradient of a large score is the difference of nearly equal numbers."""
    for scale in (3.0, 30.0):
        check(backend, dtype, (1, 2, length, 64), scale=scale, names=("q", "k", "v"))


@pytest.mark.by_backend("dtype", reference=[FLOAT], cpu=[FLOAT, BF16], triton=[FLOAT])
def test_one_key_left(backend, dtype):
    length = 80
    mask = torch.zeros(2, length, dtype=torch.bool, device=backend.device)
    mask[0, 7] = mask[1, 79] = True
    q, k, v = (t.requires_grad_() for t in tensors(backend, dtype, 2, 3, length, 20))
    out = lk.attention(q, k, v, key_mask=mask)
    out.backward(torch.ones_like(out))
    for b, key in ((0, 7), (1, 79)):
        torch.testing.assert_close(out[b], v[b, :, key : key + 1].expand_as(out[b]))
    others = ~mask[:, None, :, None].expand_as(v)
    assert not v.grad[others].any() and not k.grad[others].any()
    torch.testing.assert_close(v.grad[~others], torch.full_like(v.grad[~others], length))
    assert q.grad.abs().max() < 0.05


def test_all_keys_equal_gives_the_mean(backend):
    q, k, v = tensors(backend, FLOAT, 2, 3, 20, 8)
    mask = random_mask(backend, 2, 20)
    out = lk.attention(q, torch.zeros_like(k), v, key_mask=mask)
    for b in range(2):
        mean = v[b][:, mask[b]].mean(1, keepdim=True).expand_as(out[b])
        torch.testing.assert_close(out[b], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_nan_stays_in_its_row(backend, dtype):
    q, k, v = tensors(backend, dtype, 1, 1, 30, 16)
    clean = lk.attention(q, k, v)
    q[0, 0, 4, 3] = math.nan
    out = lk.attention(q, k, v)
    assert out[0, 0, 4].isnan().all()
    rest = torch.arange(30) != 4
    assert torch.equal(out[:, :, rest], clean[:, :, rest])
    k[0, 0, 9, 0] = math.nan
    assert lk.attention(q, k, v).isnan().all()


def in_float64():
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, 0] = True
    angle = torch.outer(torch.arange(20).double(), 0.5 ** torch.arange(4).double())
    return normal(3, 2, 3, 20, 8).unbind(), mask, Rotary(angle.cos(), angle.sin())


def test_rotary_scores_depend_on_distance_only():
    (q, k, _), _, rotary = in_float64()
    same_q, same_k = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    scores = apply_rotary(same_q, rotary) @ apply_rotary(same_k, rotary).transpose(-1, -2)
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance, -2, -1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), rtol=1e-9, atol=1e-9)


def test_the_oracle_is_softmax_of_scaled_scores():
    (q, k, v), mask, rotary = in_float64()
    scores = apply_rotary(q, rotary) @ apply_rotary(k, rotary).mT / 8**0.5
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    out = lk.attention(q, k, v, key_mask=mask, rotary=rotary)
    torch.testing.assert_close(out, weights @ v, rtol=1e-12, atol=1e-12)
    mean = lk.attention(q, torch.zeros_like(k), v, key_mask=mask)[0, :, 0]
    torch.testing.assert_close(mean, v[0][:, mask[0]].mean(1), rtol=1e-12, atol=1e-12)
