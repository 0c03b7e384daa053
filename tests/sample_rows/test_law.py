"""sample_rows: the law of the draw, its statistics, its random numbers; over every backend here."""

import numpy as np
import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.testing import chi_square_p, head_inputs, row_rng
from loopmdm_kernels.types import Head, RowRng


def usable(name: str) -> bool:
    try:
        with lk.use_backend(name):
            return True
    except RuntimeError:
        return False


BACKENDS = [name for name in ("reference", "cpu") if usable(name)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with lk.use_backend(request.param):
        yield request.param


def law_case(log_probs: torch.Tensor) -> tuple[torch.Tensor, Head]:
    """hidden [1, 1, 2] and a head whose logits are `log_probs`, carried by the bias."""
    vocab = log_probs.shape[0]
    head = Head(
        norm=torch.ones(2),
        weight=torch.zeros(vocab, 2),
        bias=log_probs.float(),
        modulation=torch.zeros(1, 2, 2),
    )
    return torch.tensor([[[1.0, -1.0]]]), head


def draw(log_probs: torch.Tensor, num: int, seed: int, chunk: int = 10_000, **options) -> np.ndarray:
    """Counts [V] of `num` draws, each its own sequence."""
    hidden, head = law_case(log_probs)
    counts = np.zeros(log_probs.shape[0], dtype=np.int64)
    for start in range(0, num, chunk):
        size = min(chunk, num - start)
        zeros = torch.zeros(size, dtype=torch.int64)
        rng = RowRng(seed, torch.arange(start, start + size), zeros, zeros)
        tokens = lk.sample_rows(hidden, head, zeros, rng, **options).token
        counts += np.bincount(tokens.numpy(), minlength=counts.shape[0])
    return counts


def test_law_small_vocabulary(backend):
    log_probs = torch.log_softmax(torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, -6.0, 2.0], dtype=torch.float64), 0)
    counts = draw(log_probs, 200_000, seed=11)
    assert chi_square_p(counts, log_probs.exp().numpy()) > 0.01


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_law_at_a_temperature(backend, temperature):
    log_probs = torch.log_softmax(torch.linspace(-2, 2, 9, dtype=torch.float64), 0)
    counts = draw(log_probs, 100_000, seed=3, temperature=temperature)
    expected = torch.softmax(log_probs / temperature, 0).numpy()
    assert chi_square_p(counts, expected) > 0.01


def test_temperature_zero_is_the_first_maximum(backend):
    hidden, head = law_case(torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0]))
    out = lk.sample_rows(hidden, head, torch.zeros(3, dtype=torch.int64), row_rng(3), temperature=0.0)
    assert out.token.tolist() == [1, 1, 1]
    assert out.top1_token.tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_row_of_nan_has_no_statistics(backend, options):
    hidden, head = head_inputs(1, 3, vocab_size=20)
    hidden, head = hidden.float(), head._replace(**{n: getattr(head, n).float() for n in head._fields[:4]})
    hidden[0, 1, 0] = float("nan")
    out = lk.sample_rows(hidden, head, torch.arange(3), row_rng(3), **options)
    for name in ("log_prob", "top1_prob", "top2_prob", "entropy"):
        assert getattr(out, name).isnan().tolist() == [False, True, False], name


def test_excluded_token_is_never_drawn(backend):
    hidden, head = law_case(torch.tensor([0.0, 5.0, 0.0, 0.0]))
    zeros = torch.zeros(2000, dtype=torch.int64)
    out = lk.sample_rows(hidden, head._replace(excluded_token=1), zeros, row_rng(2000))
    assert set(out.token.tolist()) == {0, 2, 3}
    torch.testing.assert_close(out.top1_prob, torch.full((2000,), 1 / 3), rtol=1e-5, atol=0)


def test_statistics_match_the_distribution(backend):
    hidden, head = head_inputs(vocab_size=301, excluded_token=300, per_sequence_modulation=True)
    rows = torch.tensor([0, 5, 31, 17, 5])
    probs = torch.softmax(reference.head_logits(hidden, head).flatten(0, 1)[rows][:, :300], -1)
    out = lk.sample_rows(
        hidden.float(), Head(*(t.float() for t in head[:4]), 300), rows, row_rng(5), temperature=0.7
    )
    top = probs.topk(2).values
    pairs = [
        (out.top1_prob, top[:, 0]),
        (out.top2_prob, top[:, 1]),
        (out.entropy, -(probs * probs.log()).sum(-1)),
        (out.log_prob, probs.log().gather(1, out.token[:, None])[:, 0]),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=1e-6)
    assert torch.equal(out.top1_token, probs.argmax(-1))


def test_backends_draw_the_same_tokens():
    hidden, head = head_inputs(batch=4, vocab_size=1003, excluded_token=1002)
    hidden, head = hidden.float(), Head(*(t.float() for t in head[:4]), 1002)
    rows = torch.arange(64)
    rng = RowRng(2**40 + 7, torch.arange(64) * 1000, torch.arange(64) % 5, torch.arange(64) * 31)
    tokens = []
    for name in BACKENDS:
        with lk.use_backend(name):
            tokens.append(lk.sample_rows(hidden, head, rows, rng).token)
    assert all(torch.equal(tokens[0], other) for other in tokens)
    exact = lk.sample_rows(hidden.double(), Head(*(t.double() for t in head[:4]), 1002), rows, rng).token
    assert torch.equal(tokens[0], exact)  # fp32 decides as float64 does on the same random bits


def test_a_row_does_not_depend_on_its_batch(backend):
    hidden, head = head_inputs(batch=4, vocab_size=257)
    hidden, head = hidden.float(), Head(*(t.float() for t in head[:4]))
    rows = torch.arange(64)
    rng = row_rng(64, seed=9)
    together = lk.sample_rows(hidden, head, rows, rng)
    for i in (0, 13, 63):
        one = slice(i, i + 1)
        alone = lk.sample_rows(
            hidden, head, rows[one], RowRng(9, rng.sequence[one], rng.step[one], rng.position[one])
        )
        assert torch.equal(alone.token, together.token[one])
        torch.testing.assert_close(alone.log_prob, together.log_prob[one], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 0.7}, [0.625, 0.375]),
        ({"top_p": 0.45}, [1.0]),
        ({"top_p": 0.951}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 3}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
        ({"top_k": 1}, [1.0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375]),  # .526 and .316 of the three reach .8
        ({"top_k": 2, "temperature": 0.5}, [25 / 34, 9 / 34]),
    ],
)
def test_restricted_draws(backend, options, expected):
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    counts = draw(log_probs, 20_000, seed=5, **options)
    assert counts[len(expected) :].sum() == 0
    if len(expected) > 1:
        assert chi_square_p(counts[: len(expected)], np.array(expected)) > 0.01


def test_restricted_draws_take_the_lowest_ids_on_ties(backend):
    counts = draw(torch.zeros(7, dtype=torch.float64), 3000, seed=5, top_k=3)
    assert counts[3:].sum() == 0
    assert (counts[:3] > 900).all()
    counts = draw(torch.zeros(8, dtype=torch.float64), 3000, seed=5, top_p=0.49)
    assert counts[4:].sum() == 0
    assert (counts[:4] > 650).all()


def test_a_restriction_to_everything_is_none(backend):
    """The race among some tokens uses the numbers of the race among all."""
    log_probs = torch.randn(1500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden, head = law_case(log_probs.log_softmax(0))
    zeros = torch.zeros(500, dtype=torch.int64)
    full = lk.sample_rows(hidden, head, zeros, row_rng(500))
    for options in ({"top_k": 1500}, {"top_p": 1 - 1e-7}):
        some = lk.sample_rows(hidden, head, zeros, row_rng(500), **options)
        assert torch.equal(some.token, full.token)
        torch.testing.assert_close(some.entropy, full.entropy, rtol=1e-5, atol=1e-6)


def test_a_nucleus_of_more_than_a_thousand_tokens(backend):
    hidden, head = law_case(torch.zeros(4000))
    zeros = torch.zeros(3000, dtype=torch.int64)
    token = lk.sample_rows(hidden, head, zeros, row_rng(3000), top_p=0.5).token
    assert token.max() < 2000 + 2  # to the rounding of sums of 2000 probabilities
    assert token.unique().numel() > 1400


def test_no_rows(backend):
    hidden, head = law_case(torch.zeros(4))
    out = lk.sample_rows(hidden, head, torch.zeros(0, dtype=torch.int64), row_rng(0))
    assert all(t.shape == (0,) for t in out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_k": 2.0}, "top_k: got 2.0"),
    ],
)
def test_bad_options(options, message):
    hidden, head = law_case(torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        lk.sample_rows(hidden, head, torch.zeros(1, dtype=torch.int64), row_rng(1), **options)


@pytest.mark.parametrize(
    ("rng", "error", "message"),
    [
        (row_rng(2), ValueError, r"rng.sequence: got shape \[2\], expected \[1\]"),
        (row_rng(1)._replace(seed=-1), ValueError, "rng.seed: got -1"),
        (row_rng(1)._replace(step=torch.tensor([2**30])), ValueError, "rng.step: got values in 1073741824"),
        (row_rng(1)._replace(position=torch.tensor([0.5])), TypeError, "rng.position: got float32"),
    ],
)
def test_bad_random_names(rng, error, message):
    hidden, head = law_case(torch.zeros(4))
    with pytest.raises(error, match=message):
        lk.sample_rows(hidden, head, torch.zeros(1, dtype=torch.int64), rng)


@pytest.mark.parametrize("wrong", [None, 0, (0, None, None, None), [1], "x", torch.zeros(2)])
def test_names_of_random_numbers_that_are_none(wrong):
    hidden, head = head_inputs(1, 2, vocab_size=20)
    with pytest.raises(TypeError, match=r"rng: got .*, expected a RowRng"):
        lk.sample_rows(hidden, head, torch.arange(2), wrong)


def test_whole_numbers_beyond_64_bits():
    """An int is taken as the float it stands for, however large."""
    hidden, head = head_inputs(1, 2, vocab_size=20)
    arguments = (hidden.float(), Head(*(t.float() for t in head.tensors)), torch.arange(2), row_rng(2))
    want, got = (lk.sample_rows(*arguments, temperature=t) for t in (2.0**65, 2**65))
    assert torch.equal(got.token, want.token)
    with pytest.raises(ValueError, match="temperature: got a number beyond float64"):
        lk.sample_rows(*arguments, temperature=10**400)


@pytest.mark.parametrize("temperature", [1e-20, 1.0, 1e4, 1e8, 1e20])
@pytest.mark.parametrize("kept", [{"top_k": 1}, {"top_p": 1e-30}, {"top_k": 1, "top_p": 0.5}])
def test_the_most_probable_token_is_the_same_at_any_temperature(backend, temperature, kept):
    """Also where fp32 holds no difference of log-probabilities over the temperature."""
    hidden, head = head_inputs(1, 8, vocab_size=50)
    arguments = (hidden.float(), Head(*(t.float() for t in head.tensors)), torch.arange(8), row_rng(8))
    out = lk.sample_rows(*arguments, temperature=temperature, **kept)
    assert torch.equal(out.token, out.top1_token)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.09}])
def test_a_restriction_at_a_high_temperature_is_to_the_most_probable(backend, options):
    hidden, head = head_inputs(1, 1, vocab_size=50)
    head = Head(*(t.float() for t in head.tensors))
    best = set(lk.head_logits(hidden.float(), head).flatten().topk(5).indices.tolist())
    rows = torch.zeros(500, dtype=torch.int64)
    out = lk.sample_rows(hidden.float(), head, rows, row_rng(500), temperature=1e9, **options)
    assert set(out.token.tolist()) == best  # of equal chances: 5 of 50 exceed 0.09
