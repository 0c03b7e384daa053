"""attention on the CPU: values and gradients, masks, angles, strides, extreme scores, bitwise invariance."""

import math
import random

import pytest
import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels import _C, reference
from loopmdm_kernels.cpu.attention import attention, supports
from loopmdm_kernels.testing import assert_matches_oracle
from loopmdm_kernels.testing.tolerance import luck_factor
from loopmdm_kernels.types import Rotary

DTYPES = (torch.float32, torch.bfloat16)
HEAD_DIMS = (2, 20, 32, 48, 64, 80, 128)


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


NAMES = ("out", "q", "k", "v")


def check(dtype, batch, heads, length, head_dim, *, scale=1.0, names=NAMES, **options):
    """By the tolerance rule, whose luck counts queries: the numbers of one share the errors of its scores."""
    qkv = (normal(batch, length, 3, heads, head_dim) * scale).to(dtype)
    grad = normal(batch, length, heads, head_dim, seed=2).to(dtype)
    results = [
        run(op, qkv.to(kind), grad.to(kind), **options)
        for op, kind in (
            (attention, dtype),
            (reference.attention, dtype),
            (reference.attention, torch.float64),
        )
    ]
    for name, out, baseline, oracle in zip(NAMES, *results, strict=True):
        if name in names:
            factor = luck_factor(batch * heads * length)
            assert_matches_oracle(out, baseline, oracle, name=name, factor=factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_values_and_gradients(isa, dtype, head_dim):
    draw = random.Random(head_dim)
    for case in range(4):
        length = draw.randint(1, 200)
        check(
            dtype,
            draw.randint(1, 2),
            draw.randint(1, 3),
            length,
            head_dim,
            rotary=angles(length, head_dim) if case % 2 else None,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 64, 130])
def test_masks(isa, dtype, length):
    check(dtype, 2, 2, length, 32, key_mask=random_mask(2, length), rotary=angles(length, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 65])
def test_short_sequences(isa, dtype, length):
    """Around the widths of vectors and panels, with every head apart in memory and with angles."""
    for head_dim in (6, 64):
        check(dtype, 2, 3, length, head_dim, rotary=angles(length, head_dim) if length % 2 else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token(isa, dtype):
    """Its output is its value; nothing depends on queries and keys. All but for rounding."""
    eps = torch.finfo(torch.float32).eps
    qkv, grad = normal(3, 1, 3, 2, 20).to(dtype), normal(3, 1, 2, 20, seed=2).to(dtype)
    out, of_q, of_k, of_v = run(attention, qkv, grad)
    torch.testing.assert_close(out.transpose(1, 2), qkv[:, :, 2], rtol=2 * eps, atol=0)
    torch.testing.assert_close(of_v, grad, rtol=2 * eps, atol=0)
    for name, zero in (("q", of_q), ("k", of_k)):
        assert zero.abs().max() <= 8 * eps * qkv.abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 5, 16, 17, 33])
def test_padding_changes_no_bit(isa, dtype, length):
    """A sequence alone and as the attended part of a longer one: the same output and gradients."""
    grad = normal(2, length, 2, 40, seed=2).to(dtype)
    for padded in (length + 1, 16, 33, 64, 100):
        if padded <= length:
            continue
        qkv = normal(2, padded, 3, 2, 40).to(dtype)
        mask = (torch.arange(padded) < length).expand(2, -1)
        whole = torch.zeros(2, padded, 2, 40, dtype=dtype)
        whole[:, :length] = grad
        alone = run(attention, qkv[:, :length], grad)
        inside = run(attention, qkv, whole, key_mask=mask)
        for name, one, other in zip(NAMES, alone, inside, strict=True):
            rows = other[:, :, :length] if name == "out" else other[:, :length]
            assert torch.equal(one, rows), (padded, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_head_dims(isa, dtype):
    for length, head_dim in ((37, 3), (70, 33), (20, 129)):
        check(dtype, 1, 2, length, head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "masked"), [(600, True), (1030, False)])
def test_many_blocks_of_keys(isa, dtype, length, masked):
    check(dtype, 1, 1, length, 64, key_mask=random_mask(1, length) if masked else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_later_blocks_have_the_largest_scores(isa, dtype):
    """The running maximum rises over blocks of keys, so sums are scaled down on the way."""
    length = 1100
    q, k, v = normal(3, 1, 1, length, 16)
    q, k = q.abs(), k.abs() * torch.linspace(0, 12, length, dtype=torch.float64)[:, None]
    q, k, v = (t.to(dtype) for t in (q, k, v))
    oracle = reference.attention(q.double(), k.double(), v.double())
    assert_matches_oracle(attention(q, k, v), reference.attention(q, k, v), oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 40])
def test_the_same_bits_with_and_without_gradients(isa, dtype, length):
    q, k, v = normal(3, 2, 2, length, 32).to(dtype).unbind()
    kept = attention(q.clone().requires_grad_(), k, v)
    assert kept.requires_grad
    assert torch.equal(attention(q, k, v), kept.detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scores(isa, dtype):
    """Scores in the thousands: one key wins, nothing overflows."""
    check(dtype, 1, 2, 300, 64, scale=30.0)
    q, k, v = (normal(1, 1, 90, 64, seed=s).to(dtype) for s in range(3))
    out = attention(q * 300, k * 300, v)
    assert out.isfinite().all()
    winner = (q.double() @ k.double().mT).argmax(-1)[0, 0]
    torch.testing.assert_close(out[0, 0], v[0, 0, winner])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [20, 90, 200, 256])
def test_gradients_where_few_keys_win(isa, dtype, length):
    """The gradient of a large score is the difference of nearly equal numbers."""
    for scale in (3.0, 30.0):
        check(dtype, 1, 2, length, 64, scale=scale, names=("q", "k", "v"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_left(isa, dtype):
    length = 80
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[0, 7] = mask[1, 79] = True
    q, k, v = (normal(2, 3, length, 20, seed=s).to(dtype).requires_grad_() for s in range(3))
    out = attention(q, k, v, key_mask=mask)
    out.backward(torch.ones_like(out))
    for b, key in ((0, 7), (1, 79)):
        torch.testing.assert_close(out[b], v[b, :, key : key + 1].expand_as(out[b]))
    others = ~mask[:, None, :, None].expand_as(v)
    assert not v.grad[others].any() and not k.grad[others].any()
    torch.testing.assert_close(v.grad[~others], torch.full_like(v.grad[~others], length))
    assert q.grad.abs().max() < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_may_hold_anything_finite(isa, dtype):
    mask = random_mask(1, 70)
    q, k, v, grad = (normal(1, 2, 70, 32, seed=s).to(dtype) for s in range(4))
    results = []
    for fill in (0.0, 1e4):
        leaves = [q.clone(), *(t.masked_fill(~mask[:, None, :, None], fill) for t in (k, v))]
        for leaf in leaves:
            leaf.requires_grad_()
        out = attention(*leaves, key_mask=mask)
        out.backward(grad)
        results.append([out, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(isa, dtype):
    q, k, v = (normal(1, 1, 30, 16, seed=s).to(dtype) for s in range(3))
    clean = attention(q, k, v)
    q[0, 0, 4, 3] = math.nan
    out = attention(q, k, v)
    assert out[0, 0, 4].isnan().all()
    rest = torch.arange(30) != 4
    assert torch.equal(out[:, :, rest], clean[:, :, rest])
    k[0, 0, 9, 0] = math.nan
    assert attention(q, k, v).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(isa, dtype):
    """The same bits from any layout: interleaved, transposed, expanded, sliced."""
    q, k, v, grad = (normal(2, 3, 50, 20, seed=s).to(dtype) for s in range(4))
    k = k[:, :1].expand_as(k)

    def results(arrange):
        leaves = [arrange(t.clone()).detach().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, rotary=angles(50, 20))
        out.backward(arrange(grad.clone()))
        return [out, *(leaf.grad for leaf in leaves)]

    expected = results(lambda t: t.contiguous())
    layouts = (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat((t, t), -1)[..., 20:],
        lambda t: torch.stack((t, t), -1)[..., 1],
        lambda t: t.flip(2).contiguous().flip(2),
    )
    for arrange in layouts:
        for a, b in zip(expected, results(arrange), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(attention(q, k, v), attention(q, k.contiguous(), v))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads_and_batch(isa, dtype, threads):
    batch, heads, length = 3, 3, 300
    qkv, grad = normal(batch, length, 3, heads, 32).to(dtype), normal(batch, length, heads, 32).to(dtype)
    mask, rotary = random_mask(batch, length), angles(length, 32)
    threads(1)
    expected = run(attention, qkv, grad, key_mask=mask, rotary=rotary)
    for number in (1, 2, 4, 5, 16):
        threads(number)
        for a, b in zip(expected, run(attention, qkv, grad, key_mask=mask, rotary=rotary), strict=True):
            assert torch.equal(a, b)
    for b in range(batch):
        part = slice(b, b + 1)
        alone = run(attention, qkv[part], grad[part], key_mask=mask[part], rotary=rotary)
        for a, c in zip(expected, alone, strict=True):
            assert torch.equal(a[part], c)
    head = run(attention, qkv[:, :, :, 1:2], grad[:, :, 1:2], key_mask=mask, rotary=rotary)
    assert torch.equal(expected[0][:, 1:2], head[0])
    for a, c in zip(expected[1:], head[1:], strict=True):
        assert torch.equal(a[:, :, 1:2], c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_public_op_compiled(dtype):
    torch._dynamo.reset()
    qkv, grad = normal(2, 40, 3, 2, 16).to(dtype), normal(2, 40, 2, 16).to(dtype)
    options = {"key_mask": random_mask(2, 40), "rotary": angles(40, 16)}
    results = []
    with lk.use_backend("cpu"):
        for op in (lk.attention, torch.compile(lk.attention, fullgraph=True, backend="aot_eager")):
            leaves = [t.transpose(1, 2).clone().requires_grad_() for t in qkv.unbind(2)]
            out = op(*leaves, **options)
            out.backward(grad.transpose(1, 2))
            results.append([out, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_says_what_it_supports():
    assert supports(q=torch.zeros(1)) is None
    assert supports(q=torch.zeros(1).bfloat16()) is None
    half = torch.zeros(1, 1, 2, 4).half()
    assert "q must be float32 or bfloat16, got torch.float16" in supports(q=half)
    with pytest.raises(ValueError, match="attention on the CPU: q must be float32 or bfloat16"):
        attention(half, half, half)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 5, 8).half()}, TypeError, "q: expected dtype float32 or bfloat16"),
        ({"q": torch.zeros(2, 3, 0, 8)}, ValueError, "q: expected no dimension of size 0"),
        ({"q": torch.zeros(2, 3, 8, 5).mT}, ValueError, "q: expected unit stride along the last axis"),
        ({"k": torch.zeros(2, 3, 4, 8)}, ValueError, r"k: expected shape \[2, 3, 5, 8\], got \[2, 3, 4, 8\]"),
        ({"v": torch.zeros(2, 3, 5, 8).bfloat16()}, TypeError, "v: expected dtype float32, got bfloat16"),
        ({"out": torch.zeros(2, 3, 5)}, ValueError, "out: expected shape"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "key_mask: expected shape"),
        ({"cos": torch.ones(5, 4), "sin": torch.ones(5, 3)}, ValueError, "rotary.sin: expected shape"),
        ({"cos": torch.ones(5, 4)}, TypeError, "rotary.sin: expected a torch.Tensor"),
        ({"log_sum_exp": torch.zeros(2, 3, 4)}, ValueError, "log_sum_exp: expected shape"),
        ({"num_threads": 0}, ValueError, "num_threads: expected at least 1"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {
        **{name: torch.zeros(2, 3, 5, 8) for name in ("q", "k", "v")},
        "key_mask": None,
        "cos": None,
        "sin": None,
        "num_threads": 1,
        "out": torch.zeros(2, 3, 5, 8),
        "log_sum_exp": torch.zeros(2, 3, 5),
    }
    with pytest.raises(error, match=message):
        _C.attention(**{**arguments, **changes})
