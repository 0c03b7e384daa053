"""sample_rows and head_logits in Triton: draws and statistics of the reference, and edges."""

import math

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import philox, reference
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs
from loopmdm_kernels.types import Head, RowRng

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def triton(op):
    """The public op, which must be done by the Triton kernels."""

    def call(*args, **options):
        with lk.use_backend("triton"), torch.no_grad():
            return getattr(lk, op)(*args, **options)

    return call


sample_rows, head_logits = triton("sample_rows"), triton("head_logits")


def case(device, width=36, vocab_size=301, dtype=torch.float32, excluded=True, num_rows=33):
    """(hidden, head, rows, rng): several chunks of tokens, several tiles, none of them full; rows repeat."""
    excluded_token = vocab_size // 2 if excluded else -1
    hidden, head = head_inputs(3, 11, width, vocab_size, per_sequence_modulation=excluded, seed=width)
    head = Head(*(t.to(device, dtype) for t in head[:4]), excluded_token)
    generator = torch.Generator().manual_seed(vocab_size)
    rows = torch.randint(0, 33, (num_rows,), generator=generator).to(device)
    names = (torch.randint(0, n, (num_rows,), generator=generator).to(device) for n in (2**32, 2**30, 2**31))
    return 3 * hidden.float().to(device), head, rows, RowRng(0x1234567890ABCDEF, *names)


def assert_close(out, expected, tolerance=2e-5):
    for name in ("log_prob", "top1_prob", "top2_prob", "entropy"):
        value = getattr(out, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, getattr(expected, name), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(torch.float32, 0.7), (torch.float32, 0.0), (torch.bfloat16, 1.0), (torch.float16, 1.0)],
)
def test_draws_and_statistics(device, dtype, temperature):
    inputs = case(device, dtype=dtype)
    out = sample_rows(*inputs, temperature=temperature)
    expected = reference.sample_rows(*inputs, temperature=temperature)
    assert out.token.tolist() == expected.token.tolist()
    assert out.top1_token.tolist() == expected.top1_token.tolist()
    assert_close(out, expected)


@pytest.mark.parametrize(("width", "vocab_size"), [(1, 2), (7, 33), (40, 513)])
def test_sizes(device, width, vocab_size):
    inputs = case(device, width, vocab_size, excluded=False)
    out, expected = sample_rows(*inputs), reference.sample_rows(*inputs)
    assert out.token.tolist() == expected.token.tolist()
    assert_close(out, expected)


@DTYPES
def test_statistics_against_float64(device, dtype):
    hidden, head, rows, rng = case(device, dtype=dtype)
    exact = Head(*(t.double() for t in head[:4]), head.excluded_token)
    oracle = reference.sample_rows(hidden.double(), exact, rows, rng, temperature=0.0)
    baseline = reference.sample_rows(hidden, head, rows, rng, temperature=0.0)
    out = sample_rows(hidden, head, rows, rng, temperature=0.0)
    for name in ("log_prob", "top1_prob", "top2_prob", "entropy"):
        assert_matches_oracle(getattr(out, name), getattr(baseline, name), getattr(oracle, name), name=name)


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 5}, {"top_p": 0.9, "top_k": 20}])
def test_restricted(device, options):
    inputs = case(device)
    out, expected = sample_rows(*inputs, **options), reference.sample_rows(*inputs, **options)
    assert out.token.tolist() == expected.token.tolist()
    assert_close(out, expected)


def test_compute_dtype(device):
    hidden, head, rows, rng = case(device)
    out = sample_rows(hidden, head, rows, rng, compute_dtype=torch.bfloat16)
    expected = reference.sample_rows(hidden, head, rows, rng, compute_dtype=torch.bfloat16)
    assert_close(out, expected)
    assert out.token.tolist() == expected.token.tolist()


@pytest.mark.parametrize(("place", "token"), [(773286, 4), (916545, 6)])
def test_small_race_times_have_64_bits(device, place, token):
    """A token that can win by its tiny race time alone wins exactly where 64 random bits say so."""
    seed, vocab_size = 77, 8
    zero, position = (torch.tensor([n]) for n in (0, place))
    assert philox.philox4x32(seed, zero + token // 4, position, 0, 0)[token % 4] < 256
    tokens = torch.arange(vocab_size)
    names = (name.expand(vocab_size) for name in (zero, zero, position))
    times = philox.race_times_of(seed, *names, tokens)
    rival = int(times.masked_fill(tokens == token, math.inf).argmin())
    rng = RowRng(seed, *(name.to(device) for name in (zero, zero, position)))
    for margin, winner in ((1e-4, token), (-1e-4, rival)):
        bias = torch.zeros(vocab_size)
        bias[token] = float(times[token].log() - times[rival].log()) + margin
        head = (torch.ones(2), torch.zeros(vocab_size, 2), bias, torch.zeros(1, 2, 2))
        head = Head(*(t.to(device) for t in head))
        assert int(sample_rows(torch.zeros(1, 1, 2).to(device), head, zero.to(device), rng).token) == winner


def test_ties_go_to_the_lowest_token(device):
    vocab_size = 700
    bias = torch.zeros(vocab_size)
    bias[[40, 41, 255, 256, 699]] = 1.0
    head = Head(
        *(t.to(device) for t in (torch.ones(4), torch.zeros(vocab_size, 4), bias, torch.zeros(1, 2, 4)))
    )
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    out = sample_rows(
        torch.ones(1, 1, 4, device=device), head, zero, RowRng(0, zero, zero, zero), temperature=0.0
    )
    assert out.token.tolist() == out.top1_token.tolist() == [40]
    assert out.top1_prob == out.top2_prob


@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e30])
def test_extreme_logits(device, scale):
    hidden, head, rows, rng = case(device, 32, 300)
    head = head._replace(bias=head.bias * scale)
    out, expected = (op(hidden, head, rows, rng) for op in (sample_rows, reference.sample_rows))
    assert out.token.tolist() == expected.token.tolist()
    assert_close(out, expected)


def test_impossible_tokens_are_never_drawn(device):
    hidden, head, rows, rng = case(device, 32, 300)
    bias = torch.full((300,), -math.inf, device=device)
    bias[[3, 290]] = 0.0
    out, expected = (
        op(hidden, head._replace(bias=bias), rows, rng) for op in (sample_rows, reference.sample_rows)
    )
    assert set(out.token.tolist()) <= {3, 290}
    assert out.token.tolist() == expected.token.tolist()
    assert_close(out, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["row", "weight", "all"])
def test_nan_stays_in_its_row_and_tokens_valid(device, where, temperature):
    hidden, head, rows, rng = case(device, 32, 300)
    head = head._replace(excluded_token=299)
    clean = sample_rows(hidden, head, rows, rng, temperature=temperature)
    bad = torch.ones_like(rows, dtype=torch.bool)
    if where == "row":
        hidden.view(-1, 32)[rows[4], 5] = math.nan
        bad = rows == rows[4]
    else:
        head.weight[5 if where == "weight" else slice(None), 3] = math.nan
    out = sample_rows(hidden, head, rows, rng, temperature=temperature)
    for name, value in out._asdict().items():
        if name.endswith("token"):
            assert bool(((value >= 0) & (value < 299)).all())
        else:
            assert bool(value[bad].isnan().all()), name
        assert torch.equal(value[~bad], getattr(clean, name)[~bad])


def test_excluded_token_may_hold_nan(device):
    hidden, head, rows, rng = case(device, 32, 300)
    clean = sample_rows(hidden, head, rows, rng)
    head.weight[head.excluded_token] = math.nan
    for a, b in zip(clean, sample_rows(hidden, head, rows, rng), strict=True):
        assert torch.equal(a, b)


def test_a_row_does_not_depend_on_the_others(device):
    hidden, head, rows, rng = case(device)
    together = sample_rows(hidden, head, rows, rng)
    for part in (slice(0, 1), slice(3, 20)):
        names = RowRng(rng.seed, *(name[part] for name in rng[1:]))
        for alone, value in zip(sample_rows(hidden, head, rows[part], names), together, strict=True):
            assert torch.equal(alone, value[part])


def test_no_rows(device):
    hidden, head, rows, _ = case(device)
    empty = rows[:0]
    for options in ({}, {"top_k": 3}):
        out = sample_rows(hidden, head, empty, RowRng(0, empty, empty, empty), **options)
        assert all(t.shape == (0,) for t in out) and out.token.dtype == torch.int64


@DTYPES
def test_head_logits(device, dtype):
    hidden, head, _, _ = case(device, dtype=dtype)
    exact = Head(*(t.double() for t in head[:4]), head.excluded_token)
    oracle = reference.head_logits(hidden.double(), exact)
    out = head_logits(hidden, head)
    assert out.dtype == dtype
    assert_matches_oracle(out, reference.head_logits(hidden, head), oracle)
