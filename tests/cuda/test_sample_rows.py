"""`sample_rows` of the Hopper backend, its kernels emulated: tokens of the reference, statistics, edges."""

import math

import pytest
import torch

from loopmdm_kernels import philox, reference
from loopmdm_kernels.cuda import sample_rows as module
from loopmdm_kernels.cuda.head import why_not_on
from loopmdm_kernels.cuda.head_logits import head_logits
from loopmdm_kernels.cuda.head_logits import supports as logits_supports
from loopmdm_kernels.cuda.sample_rows import sample_rows, supports
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs
from loopmdm_kernels.testing.law import chi_square_p
from loopmdm_kernels.types import Head, RowRng

BF16 = torch.bfloat16
STATISTICS = ("log_prob", "top1_prob", "top2_prob", "entropy")


def case(width=72, vocab_size=601, num_rows=33, excluded=True, length=50):
    """(hidden, head, rows, rng): several chunks of tokens, no tile full; rows repeat."""
    excluded_token = vocab_size // 2 if excluded else -1
    hidden, head = head_inputs(3, length, width, vocab_size, per_sequence_modulation=excluded, seed=width)
    head = Head(*(t.to(BF16) for t in head[:4]), excluded_token)
    generator = torch.Generator().manual_seed(vocab_size)
    rows = torch.randint(0, 3 * length, (num_rows,), generator=generator)
    names = (torch.randint(0, n, (num_rows,), generator=generator) for n in (2**32, 2**30, 2**31))
    return 3 * hidden.float(), head, rows, RowRng(0x1234567890ABCDEF, *names)


def plain_head(bias, width=8):
    """Logits are the bias."""
    vocab_size = bias.shape[0]
    return Head(torch.ones(width), torch.zeros(vocab_size, width, dtype=BF16), bias, torch.zeros(1, 2, width))


# An element of a normalised row that lies between two bf16 numbers may be rounded to the other one.
ROUNDING = 5e-3


def assert_as_reference(inputs, tolerance=ROUNDING, **options):
    out, expected = (op(*inputs, **options) for op in (sample_rows, reference.sample_rows))
    assert out.token.tolist() == expected.token.tolist()
    assert out.top1_token.tolist() == expected.top1_token.tolist()
    for name in STATISTICS:
        value = getattr(out, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, getattr(expected, name), atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("num_rows", [33, 200])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_draws_and_statistics(gpu, num_rows, temperature):
    """Tiles of 64 rows and two chunks, and pairs of 128 rows."""
    assert_as_reference(case(num_rows=num_rows), temperature=temperature)
    names = [name for name, _ in gpu.launches]
    assert names == ["modulated_rows_sm90", "sample_rows_sm90", "sample_rows_combine_sm90"]


@pytest.mark.parametrize(("width", "vocab_size"), [(8, 2), (64, 256), (200, 257)])
def test_sizes(gpu, width, vocab_size):
    assert_as_reference(case(width, vocab_size, excluded=False))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_statistics_of_given_logits(gpu, temperature):
    """Without rounding of operands: the reductions alone, to fp32."""
    logits = 3 * torch.randn(601, generator=torch.Generator().manual_seed(1))
    _, _, rows, rng = case()
    inputs = (torch.zeros(3, 50, 8), plain_head(logits)._replace(excluded_token=600), rows, rng)
    assert_as_reference(inputs, tolerance=2e-6, temperature=temperature)


def test_statistics_against_float64(gpu):
    hidden, head, rows, rng = case()
    exact = Head(*(t.double() for t in head[:4]), head.excluded_token)
    oracle = reference.sample_rows(hidden.double(), exact, rows, rng, temperature=0.0)
    baseline = reference.sample_rows(hidden, head, rows, rng, temperature=0.0)
    out = sample_rows(hidden, head, rows, rng, temperature=0.0)
    for name in STATISTICS:
        assert_matches_oracle(getattr(out, name), getattr(baseline, name), getattr(oracle, name), name=name)


def test_weights_in_fp32_products_in_bf16(gpu):
    hidden, head, rows, rng = case()
    head = Head(*(t.float() for t in head[:4]), head.excluded_token)
    assert_as_reference((hidden, head, rows, rng), compute_dtype=BF16)


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_p": 0.9, "top_k": 20}])
def test_restricted(gpu, monkeypatch, options):
    monkeypatch.setattr(module, "_ROWS_WITH_LOGITS", 20)
    assert_as_reference(case(vocab_size=300), **options)
    assert [name for name, _ in gpu.launches].count("head_logits_sm90") == 2


@pytest.mark.parametrize(("vocab_size", "length"), [(300, 50), (257, 11)])
def test_head_logits(gpu, vocab_size, length):
    """Rows that begin at even elements and such that do not; tiles of 128 and of 64 rows."""
    hidden, head, _, _ = case(vocab_size=vocab_size, length=length)
    out = head_logits(hidden, head)
    assert out.dtype == BF16
    exact = Head(*(t.double() for t in head[:4]), head.excluded_token)
    oracle = reference.head_logits(hidden.double(), exact)
    assert_matches_oracle(out, reference.head_logits(hidden, head), oracle)


@pytest.mark.parametrize("constant", [1e-3, 40.7, 1e4 / 3, 1e10 / 3])
def test_a_constant_row_has_a_norm_of_zero(gpu, constant):
    """So its logits are those of the shift alone, whatever its mean was rounded to."""
    hidden, head, _, _ = case(excluded=False)
    hidden[1, 7] = constant
    shift = head.modulation[0, 0].float()
    want = shift @ head.weight.float().T + head.bias.float()
    torch.testing.assert_close(head_logits(hidden, head)[1, 7], want.to(BF16), rtol=2**-7, atol=1e-3)


def test_a_row_whose_variance_overflows_is_nan(gpu):
    """Not finite and wrong: 1 / sqrt(infinity) is 0. Other rows are what they were."""
    hidden, head, _, _ = case()
    expected = head_logits(hidden, head)
    hidden[1, 7] *= 1e20
    out = head_logits(hidden, head)
    others = torch.arange(head.weight.shape[0]) != head.excluded_token
    assert bool(out[1, 7, others].isnan().all())
    out[1, 7] = expected[1, 7]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(gpu, temperature):
    """Nor on the size of the tiles, the number of blocks and the order of loads."""
    hidden, head, rows, rng = case(num_rows=200)
    together = sample_rows(hidden, head, rows, rng, temperature=temperature)
    for part, multiprocessors in ((slice(0, 1), 2), (slice(30, 90), 8), (slice(20, 190), 5)):
        gpu.multiprocessors, gpu.seed = multiprocessors, multiprocessors
        names = RowRng(rng.seed, *(name[part] for name in rng[1:]))
        out = sample_rows(hidden, head, rows[part], names, temperature=temperature)
        for alone, value in zip(out, together, strict=True):
            assert torch.equal(alone, value[part])


@pytest.mark.parametrize(("place", "token"), [(773286, 4), (916545, 6)])
@pytest.mark.parametrize(("num_rows", "row"), [(1, 0), (12, 9), (140, 137)])
def test_small_race_times_have_64_bits(gpu, place, token, num_rows, row):
    """A token that can win by its tiny race time alone wins exactly where 64 random bits say so.

    Rows that lie in the upper and the lower half of what a thread holds, in tiles of 64 and of 128.
    """
    seed, vocab_size = 77, 8
    zero, position = (torch.tensor([n]) for n in (0, place))
    assert philox.philox4x32(seed, zero + token // 4, position, 0, 0)[token % 4] < 256
    tokens = torch.arange(vocab_size)
    names = (name.expand(vocab_size) for name in (zero, zero, position))
    times = philox.race_times_of(seed, *names, tokens)
    rival = int(times.masked_fill(tokens == token, math.inf).argmin())
    zeros, positions = torch.zeros(2, num_rows, dtype=torch.int64).unbind()
    positions[row] = place
    for margin, winner in ((1e-4, token), (-1e-4, rival)):
        bias = torch.zeros(vocab_size)
        bias[token] = float(times[token].log() - times[rival].log()) + margin
        out = sample_rows(
            torch.zeros(1, 1, 8), plain_head(bias), zeros, RowRng(seed, zeros, zeros, positions)
        )
        assert int(out.token[row]) == winner


def test_draws_follow_the_law(gpu):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    number = 1200
    zeros, sequence = torch.zeros(number, dtype=torch.int64), torch.arange(number)
    out = sample_rows(
        torch.zeros(1, 1, 8), plain_head(logits), zeros, RowRng(5, sequence, zeros, zeros), temperature=0.8
    )
    probs = torch.softmax(logits.double() / 0.8, 0)
    assert chi_square_p(out.token.bincount(minlength=12).numpy(), probs.numpy()) > 1e-3


def test_ties_go_to_the_lowest_token(gpu):
    bias = torch.zeros(700)
    bias[[40, 41, 255, 256, 699]] = 1.0
    zero = torch.zeros(1, dtype=torch.int64)
    out = sample_rows(
        torch.ones(1, 1, 8), plain_head(bias), zero, RowRng(0, zero, zero, zero), temperature=0.0
    )
    assert out.token.tolist() == out.top1_token.tolist() == [40]
    assert out.top1_prob == out.top2_prob


@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e30])
def test_extreme_logits(gpu, scale):
    hidden, head, rows, rng = case(vocab_size=300)
    assert_as_reference((hidden, head._replace(bias=head.bias * scale), rows, rng))


def test_impossible_tokens_are_never_drawn(gpu):
    hidden, head, rows, rng = case(vocab_size=600)
    bias = torch.full((600,), -math.inf)
    bias[[3, 590]] = 0.0  # a chunk without any lies between
    out = assert_as_reference((hidden, head._replace(bias=bias), rows, rng))
    assert set(out.token.tolist()) <= {3, 590}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["row", "weight", "all"])
def test_nan_stays_in_its_row_and_tokens_valid(gpu, where, temperature):
    hidden, head, rows, rng = case(vocab_size=300)
    head = head._replace(excluded_token=299)
    clean = sample_rows(hidden, head, rows, rng, temperature=temperature)
    bad = torch.ones_like(rows, dtype=torch.bool)
    if where == "row":
        hidden.view(-1, 72)[rows[4], 5] = math.nan
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


def test_excluded_token_may_hold_nan(gpu):
    hidden, head, rows, rng = case()
    clean = sample_rows(hidden, head, rows, rng)
    head.weight[head.excluded_token] = math.nan
    for a, b in zip(clean, sample_rows(hidden, head, rows, rng), strict=True):
        assert torch.equal(a, b)


def test_no_rows(gpu):
    hidden, head, rows, _ = case()
    empty = rows[:0]
    for options in ({}, {"top_k": 3}):
        out = sample_rows(hidden, head, empty, RowRng(0, empty, empty, empty), **options)
        assert all(t.shape == (0,) for t in out) and out.token.dtype == torch.int64
    assert not gpu.launches


def test_it_is_for_hopper(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = "its kernels are for compute capability 9.0 (H100, H200), got 8.0"
    assert why_not_on(device) == reason and why_not_on(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_on(device) is None


def test_what_it_does_not_do(gpu):
    hidden, head, _, _ = case()
    assert supports(hidden=hidden, head=head) is None
    assert supports(hidden=hidden.double(), head=head) == "hidden must be float32, got torch.float64"
    reason = supports(hidden=hidden, head=head, compute_dtype=torch.float32)
    assert reason == "compute_dtype must be bfloat16, got torch.float32"
    wide = torch.empty(1, 1, 8).expand(2**16, 2**15, 8)
    assert supports(hidden=wide, head=head) == "hidden may have 2^31 - 1 tokens, got 2147483648"
    assert logits_supports(hidden=hidden.requires_grad_(), head=head) == "it has no gradients"
    assert supports(hidden=hidden[..., :71], head=head) == "hidden must be a multiple of 8 wide, got 71"
