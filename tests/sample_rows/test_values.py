"""sample_rows: tokens and statistics against the reference and float64, and their edges."""

import math

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import philox
from loopmdm_kernels.testing import reference
from tests.sample_rows.cases import BF16, FLOAT, HALF, STATISTICS, case, check, plain_case, some

# D and V around the widths of lanes, tiles (96 tokens) and chunks (3072) on the CPU; of steps and chunks.
SIZES = pytest.mark.by_backend(
    "size",
    reference=[(7, 95)],
    cpu=[(1, 2), (7, 95), (32, 96), (48, 97), (64, 10), (37, 3073), (96, 6200)],
    triton=[(1, 2), (7, 33), (40, 513)],
    cuda=[(8, 2), (64, 256), (200, 257)],
)
WEIGHT_AND_COMPUTE_DTYPES = pytest.mark.by_backend(
    "dtypes",
    reference=[(FLOAT, FLOAT)],
    cpu=[(FLOAT, FLOAT), (FLOAT, BF16), (BF16, FLOAT), (BF16, BF16)],
    triton=[(FLOAT, FLOAT), (FLOAT, BF16), (BF16, BF16), (HALF, HALF)],
    cuda=[(BF16, BF16), (FLOAT, BF16)],
)


@SIZES
@pytest.mark.parametrize("excluded", [False, True])
def test_sizes(backend, size, excluded):
    check(backend, case(backend, None, size, excluded=excluded))


@pytest.mark.by_backend("size", cpu=[(1, 2), (7, 95), (32, 96), (48, 97), (64, 10), (37, 3073), (96, 6200)],
                        reference=[None], triton=[None], cuda=[None])  # fmt: skip
@WEIGHT_AND_COMPUTE_DTYPES
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_dtypes_and_temperatures(backend, size, dtypes, temperature):
    weight, computed = dtypes
    check(backend, case(backend, weight, size), temperature=temperature, compute_dtype=computed)


@pytest.mark.backends("reference", "cpu", "cuda", "gpu")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_many_rows(backend, temperature):
    """More than one tile of rows."""
    check(backend, case(backend, num_rows=200), temperature=temperature)


@pytest.mark.backends("reference", "cpu", "triton")
def test_fp32_decides_as_float64_does_on_the_same_random_bits(backend):
    hidden, head, rows, rng = case(backend, size=(32, 301 if backend.emulated else 1003), num_rows=64)
    exact = head._replace(**{name: getattr(head, name).double() for name in head._fields[:4]})
    drawn = lk.sample_rows(hidden, head, rows, rng).token
    assert torch.equal(drawn, reference.sample_rows(hidden.double(), exact, rows, rng).token)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_statistics_of_given_logits(backend, temperature):
    """Without products: the reductions alone, to fp32."""
    logits = 3 * torch.randn(601, generator=torch.Generator().manual_seed(1))
    hidden, head, rows, rng = plain_case(backend, logits, 33)
    inputs = (hidden, head._replace(excluded_token=600), rows, rng)
    check(backend, inputs, tolerance=2e-6, temperature=temperature)


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 5}, {"top_p": 0.9, "top_k": 20}], ids=str)
def test_restricted(backend, options, monkeypatch):
    monkeypatch.setattr("loopmdm_kernels.cuda.sample_rows._ROWS_WITH_LOGITS", 20)
    check(backend, case(backend), **options)


# (position, token, high word, low word): words of seed 77 that take 64 bits, among 24 million.
REFINED = [(773286, 4, 174, 3750244668), (916545, 6, 18, 4089275090)]


@pytest.mark.parametrize(("position", "token", "high", "low"), REFINED)
@pytest.mark.by_backend(
    "row", reference=[(1, 0)], cpu=[(1, 0)], triton=[(1, 0)], cuda=[(1, 0), (12, 9), (140, 137)]
)
def test_small_race_times_have_64_bits(backend, position, token, high, low, row):
    """A token that can win by its tiny race time alone wins exactly where 64 random bits say so.

    row: of how many, and which: in the upper and lower half of what a thread holds, in tiles of 64 and 128.
    """
    num_rows, index = row
    seed, vocab_size = 77, 8
    zero, where = torch.zeros(1, dtype=torch.int64), torch.tensor([position])
    words = [philox.philox4x32(seed, zero + token // 4 + group, where, 0, 0) for group in (0, 1 << 31)]
    assert [int(word[token % 4]) for word in words] == [high, low] and high < 256
    exact = -math.log1p(-(high + (low + 0.5) * 2.0**-32) * 2.0**-32)
    times = philox.race_times(seed, zero, zero, where, vocab_size, torch.float64)[0]
    times[token] = math.inf
    rival = int(times.argmin())
    positions = torch.zeros(num_rows, dtype=torch.int64)
    positions[index] = position
    for margin, winner in ((1e-4, token), (-1e-4, rival)):
        bias = torch.zeros(vocab_size)
        bias[token] = math.log(exact) - math.log(float(times[rival])) + margin
        hidden, head, rows, rng = plain_case(backend, bias, num_rows, seed=seed, positions=positions)
        drawn = lk.sample_rows(hidden, head, rows, rng._replace(sequence=torch.zeros_like(rng.sequence)))
        assert int(drawn.token[index]) == winner


@pytest.mark.by_backend(
    "tied",
    reference=[(7000, [40, 41, 95, 96, 3071, 3072, 6999])],
    cpu=[(7000, [40, 41, 95, 96, 3071, 3072, 6999])],
    triton=[(700, [40, 41, 255, 256, 699])],
    cuda=[(700, [40, 41, 255, 256, 699])],
)
def test_ties_go_to_the_lowest_token(backend, tied):
    vocab_size, tokens = tied
    bias = torch.zeros(vocab_size)
    bias[tokens] = 1.0
    out = lk.sample_rows(*plain_case(backend, bias, 3), temperature=0.0)
    assert out.token.tolist() == out.top1_token.tolist() == [40] * 3
    assert torch.equal(out.top1_prob, out.top2_prob)


@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e30])
def test_extreme_logits(backend, scale):
    hidden, head, rows, rng = case(backend)
    check(backend, (hidden, head._replace(bias=head.bias.float() * scale), rows, rng))


def test_impossible_tokens_are_never_drawn(backend):
    hidden, head, rows, rng = case(backend)
    possible = {3, len(head.bias) - 10}  # a chunk without any lies between
    bias = torch.full_like(head.bias, -math.inf, dtype=FLOAT)
    bias[list(possible)] = 0.0
    out = check(backend, (hidden, head._replace(bias=bias), rows, rng))
    assert set(out.token.tolist()) <= possible


def test_the_excluded_token_is_never_drawn(backend):
    hidden, head, rows, rng = plain_case(backend, torch.tensor([0.0, 5.0, 0.0, 0.0]), 200)
    out = lk.sample_rows(hidden, head._replace(excluded_token=1), rows, rng)
    assert set(out.token.tolist()) == {0, 2, 3}
    torch.testing.assert_close(out.top1_prob, torch.full_like(out.top1_prob, 1 / 3), rtol=1e-5, atol=0)


def assert_valid_tokens(out, head):
    for token in (out.token, out.top1_token):
        assert ((token >= 0) & (token < len(head.bias)) & (token != head.excluded_token)).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_nan_stays_in_its_row(backend, options):
    hidden, head, rows, rng = case(backend)
    clean = lk.sample_rows(hidden, head, rows, rng, **options)
    hidden.flatten(0, 1)[rows[4], 5] = math.nan
    out = lk.sample_rows(hidden, head, rows, rng, **options)
    assert_valid_tokens(out, head)
    bad = rows == rows[4]
    for name, value in out._asdict().items():
        assert name.endswith("token") or value[bad].isnan().all(), name
        assert torch.equal(value[~bad], getattr(clean, name)[~bad]), name


@pytest.mark.by_backend("excluded", reference=[-1], cpu=[-1, 0, 4, "last"], triton=["last"], cuda=["last"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["hidden", "one weight", "weights", "bias"])
def test_nan_gives_nan_statistics_and_a_valid_token(backend, where, temperature, excluded):
    hidden, head, rows, rng = case(backend)
    head = head._replace(excluded_token=len(head.bias) - 1 if excluded == "last" else excluded)
    values = {"hidden": hidden, "one weight": head.weight[5, 3], "weights": head.weight, "bias": head.bias[7]}
    values[where].fill_(math.nan)
    out = lk.sample_rows(hidden, head, rows, rng, temperature=temperature)
    assert_valid_tokens(out, head)
    for name in STATISTICS:
        assert getattr(out, name).isnan().all(), name


def test_the_excluded_token_may_hold_nan(backend):
    hidden, head, rows, rng = case(backend)
    clean = lk.sample_rows(hidden, head, rows, rng)
    head.weight[head.excluded_token] = math.nan
    for a, b in zip(clean, lk.sample_rows(hidden, head, rows, rng), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=str)
def test_no_rows(backend, options):
    out = lk.sample_rows(*some(case(backend), slice(0)), **options)
    assert all(t.shape == (0,) for t in out) and out.token.dtype == torch.int64


@pytest.mark.parametrize("temperature", [1e-20, 1.0, 1e4, 1e8, 1e20])
@pytest.mark.parametrize("kept", [{"top_k": 1}, {"top_p": 1e-30}, {"top_k": 1, "top_p": 0.5}], ids=str)
def test_the_most_probable_token_is_the_same_at_any_temperature(backend, temperature, kept):
    """Also where fp32 holds no difference of log-probabilities over the temperature."""
    out = lk.sample_rows(*case(backend, size=(32, 50), num_rows=8), temperature=temperature, **kept)
    assert torch.equal(out.token, out.top1_token)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.09}], ids=str)
def test_a_restriction_at_a_high_temperature_is_to_the_most_probable(backend, options):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    out = lk.sample_rows(*plain_case(backend, logits, 500), temperature=1e9, **options)
    best = set(logits.topk(5).indices.tolist())
    assert set(out.token.tolist()) == best  # of equal chances: 5 of 50 exceed 0.09
