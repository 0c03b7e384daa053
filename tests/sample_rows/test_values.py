"""sample_rows of every instruction set against a float64 computation and against the reference."""

import math

import numpy as np
import pytest
import torch

from loopmdm_kernels import philox, reference
from loopmdm_kernels.cpu.sample_rows import sample_rows
from loopmdm_kernels.testing import head_inputs
from loopmdm_kernels.types import Head, RowRng

# D and V around the widths of lanes, tiles (96 tokens) and chunks (3072 tokens).
SIZES = [(1, 2), (7, 95), (32, 96), (48, 97), (64, 10), (37, 3073), (96, 6200)]


def case(width, vocab_size, weight_dtype=torch.float32, excluded=True):
    excluded_token = vocab_size // 2 if excluded else -1
    hidden, head = head_inputs(
        batch=3,
        length=11,
        hidden=width,
        vocab_size=vocab_size,
        excluded_token=excluded_token,
        per_sequence_modulation=True,
        seed=width + vocab_size,
    )
    head = Head(
        head.norm.float(),
        head.weight.to(weight_dtype),
        head.bias.float(),
        head.modulation.float(),
        excluded_token,
    )
    generator = torch.Generator().manual_seed(vocab_size)
    rows = torch.randint(0, 33, (25,), generator=generator)
    rng = RowRng(
        0x1234567890ABCDEF,
        torch.randint(0, 2**32, (25,), generator=generator),
        torch.randint(0, 2**30, (25,), generator=generator),
        torch.randint(0, 2**31, (25,), generator=generator),
    )
    return 5 * hidden.float(), head, rows, rng


def float64_probs(hidden, head, rows):
    """[R, V] by the definition, in numpy float64."""
    x = hidden.double().numpy().reshape(-1, hidden.shape[-1])[rows.numpy()]
    modulation = head.modulation.double().numpy()[rows.numpy() // hidden.shape[1]]
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    x = x * head.norm.double().numpy() * (1 + modulation[:, 1]) + modulation[:, 0]
    logits = x @ head.weight.double().numpy().T + head.bias.double().numpy()
    if head.excluded_token >= 0:
        logits[:, head.excluded_token] = -np.inf
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return probs / probs.sum(1, keepdims=True)


@pytest.mark.parametrize(("width", "vocab_size"), SIZES)
@pytest.mark.parametrize("excluded", [False, True])
def test_statistics_in_float32(isa, width, vocab_size, excluded):
    hidden, head, rows, rng = case(width, vocab_size, excluded=excluded)
    out = sample_rows(hidden, head, rows, rng)
    probs = float64_probs(hidden, head, rows)
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)
    every = np.arange(len(rows))
    ordered = np.sort(probs, axis=1)
    entropy = -np.where(probs > 0, probs * np.where(probs > 0, log_probs, 0), 0).sum(1)
    np.testing.assert_allclose(out.log_prob.numpy(), log_probs[every, out.token.numpy()], atol=1e-5)
    np.testing.assert_allclose(out.top1_prob.numpy(), ordered[:, -1], rtol=1e-5)
    np.testing.assert_allclose(out.top2_prob.numpy(), ordered[:, -2], rtol=1e-5)
    np.testing.assert_allclose(out.entropy.numpy(), entropy, atol=1e-5)
    np.testing.assert_allclose(probs[every, out.top1_token.numpy()], ordered[:, -1], rtol=1e-5)


@pytest.mark.parametrize(("width", "vocab_size"), SIZES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_same_draw_as_the_reference(isa, width, vocab_size, weight_dtype, compute_dtype, temperature):
    hidden, head, rows, rng = case(width, vocab_size, weight_dtype)
    options = {"temperature": temperature, "compute_dtype": compute_dtype}
    out = sample_rows(hidden, head, rows, rng, **options)
    expected = reference.sample_rows(hidden, head, rows, rng, **options)
    assert out.token.tolist() == expected.token.tolist()
    assert out.top1_token.tolist() == expected.top1_token.tolist()
    for name in ("log_prob", "top1_prob", "top2_prob", "entropy"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), atol=2e-5, rtol=2e-5)
        assert getattr(out, name).dtype == torch.float32


def words_below_refinement(seed, num_positions, num_groups):
    """(position, token, high, low) of the race words that take 64 bits, by an independent Philox in numpy."""

    def philox(group, position):
        x = [group, position, np.zeros_like(group), np.zeros_like(group)]
        key0, key1 = seed & 0xFFFFFFFF, seed >> 32
        for _ in range(10):
            first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
            low = np.uint64(0xFFFFFFFF)
            x = [
                (second >> np.uint64(32)) ^ x[1] ^ np.uint64(key0),
                second & low,
                (first >> np.uint64(32)) ^ x[3] ^ np.uint64(key1),
                first & low,
            ]
            key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
        return np.stack(x, axis=-1)

    position, group = (a.reshape(-1) for a in np.mgrid[0:num_positions, 0:num_groups].astype(np.uint64))
    words = philox(group, position)
    where, word = np.nonzero(words < 256)
    low_words = philox(group[where] | np.uint64(1 << 31), position[where])
    for i, w, low in zip(where, word, low_words, strict=True):
        yield int(position[i]), int(4 * group[i] + w), int(words[i, w]), int(low[w])


def test_small_race_times_have_64_bits(isa):
    """A token that can win by its tiny race time alone wins exactly where 64 random bits say so."""
    seed, vocab_size = 77, 8
    hits = list(words_below_refinement(seed, 3_000_000, vocab_size // 4))
    assert hits  # one word in 2^24 is refined, and these are 24 million
    hidden = torch.zeros(1, 1, 2)
    zero = torch.zeros(1, dtype=torch.int64)
    for position, token, high, low in hits:
        exact = -math.log1p(-(high + (low + 0.5) * 2.0**-32) * 2.0**-32)
        rng = RowRng(seed, zero, zero, torch.tensor([position]))
        others = torch.zeros(vocab_size)
        others[token] = -math.inf
        head = Head(torch.ones(2), torch.zeros(vocab_size, 2), others, torch.zeros(1, 2, 2))
        rival = int(sample_rows(hidden, head, zero, rng).token)
        times = philox.race_times(seed, zero, zero, rng.position, vocab_size, torch.float64)[0]
        for margin, winner in ((1e-4, token), (-1e-4, rival)):
            bias = others.clone()
            bias[token] = math.log(exact) - math.log(float(times[rival])) + margin
            assert int(sample_rows(hidden, head._replace(bias=bias), zero, rng).token) == winner


def test_ties_go_to_the_lowest_token(isa):
    vocab_size = 7000
    bias = torch.zeros(vocab_size)
    bias[[40, 41, 95, 96, 3071, 3072, 6999]] = 1.0
    head = Head(torch.ones(4), torch.zeros(vocab_size, 4), bias, torch.zeros(1, 2, 4))
    zero = torch.zeros(1, dtype=torch.int64)
    out = sample_rows(torch.ones(1, 1, 4), head, zero, RowRng(0, zero, zero, zero), temperature=0.0)
    assert out.token.tolist() == out.top1_token.tolist() == [40]
    assert out.top1_prob == out.top2_prob


@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e30])
def test_extreme_logits(isa, scale):
    hidden, head, rows, rng = case(32, 500)
    head = head._replace(bias=head.bias * scale)
    out = sample_rows(hidden, head, rows, rng)
    expected = reference.sample_rows(hidden, head, rows, rng)
    assert out.token.tolist() == expected.token.tolist()
    torch.testing.assert_close(out.entropy, expected.entropy, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(out.log_prob, expected.log_prob, atol=2e-5, rtol=2e-5)


def test_impossible_tokens_are_never_drawn(isa):
    hidden, head, rows, rng = case(32, 200)
    bias = torch.full((200,), -math.inf)
    bias[[3, 150]] = 0.0
    out = sample_rows(hidden, head._replace(bias=bias), rows, rng)
    expected = reference.sample_rows(hidden, head._replace(bias=bias), rows, rng)
    assert set(out.token.tolist()) <= {3, 150}
    assert out.token.tolist() == expected.token.tolist()
    torch.testing.assert_close(out.entropy, expected.entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("excluded_token", [-1, 0, 4, 199])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["hidden", "one weight", "weights", "bias"])
def test_nan_gives_nan_statistics_and_a_valid_token(isa, where, temperature, excluded_token):
    hidden, head, rows, rng = case(32, 200)
    head = head._replace(excluded_token=excluded_token)
    if where == "hidden":
        hidden[:] = math.nan
    elif where == "one weight":
        head.weight[5, 3] = math.nan
    elif where == "weights":
        head.weight[:] = math.nan
    else:
        head.bias[7] = math.nan
    out = sample_rows(hidden, head, rows, rng, temperature=temperature)
    for token in (out.token, out.top1_token):
        assert ((token >= 0) & (token < 200) & (token != excluded_token)).all()
    for name in ("log_prob", "top1_prob", "top2_prob", "entropy"):
        assert getattr(out, name).isnan().all(), name


def test_nan_in_one_row_stays_there(isa):
    hidden, head, _, _ = case(32, 200)
    rows = torch.arange(33)
    rng = RowRng(1, rows, rows, rows)
    clean = sample_rows(hidden, head, rows, rng)
    hidden[1, 4, 7] = math.nan
    out = sample_rows(hidden, head, rows, rng)
    for a, b in zip(clean, out, strict=True):
        assert torch.equal(a[rows != 15], b[rows != 15])
    assert out.log_prob[15].isnan()


def test_excluded_token_may_hold_nan(isa):
    hidden, head, rows, rng = case(32, 200)
    clean = sample_rows(hidden, head, rows, rng)
    head.weight[head.excluded_token] = math.nan
    for a, b in zip(clean, sample_rows(hidden, head, rows, rng), strict=True):
        assert torch.equal(a, b)


def test_no_rows(isa):
    hidden, head, _, _ = case(32, 200)
    empty = torch.zeros(0, dtype=torch.int64)
    out = sample_rows(hidden, head, empty, RowRng(0, empty, empty, empty))
    assert all(t.shape == (0,) for t in out)
    assert out.token.dtype == torch.int64
