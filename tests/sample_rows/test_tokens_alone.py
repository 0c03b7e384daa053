"""sample_rows without statistics: the same tokens, though most logits are bounded and not computed."""

import math

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from loopmdm_kernels.calls import Draw, SampleCall
from loopmdm_kernels.cpu import sample_rows as on_cpu
from loopmdm_kernels.types import Head, RowRng
from tests.sample_rows.cases import BF16, FLOAT, STATISTICS, case, plain_case, some

WEIGHT_AND_COMPUTE_DTYPES = [(FLOAT, FLOAT), (FLOAT, BF16), (BF16, FLOAT), (BF16, BF16)]
SIZES = [(1, 2), (7, 95), (48, 257), (130, 6200)]


@pytest.fixture(autouse=True)
def small_heads_too(monkeypatch):
    monkeypatch.setattr(on_cpu, "_LEAST_QUANTIZED", 1)


def check(inputs, **options):
    """The tokens of a draw with statistics, which stay in the dark."""
    whole, alone = lk.sample_rows(*inputs, **options), lk.sample_rows(*inputs, statistics=False, **options)
    assert alone.token.tolist() == whole.token.tolist()
    assert all(getattr(alone, name).isnan().all() for name in STATISTICS)
    assert (alone.top1_token == -1).all()
    assert [value.dtype for value in alone] == [value.dtype for value in whole]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}], ids=str)
def test_every_backend(backend, options):
    check(case(backend), **options)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtypes", WEIGHT_AND_COMPUTE_DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1e-20])
def test_sizes_dtypes_and_temperatures(backend, size, dtypes, temperature):
    weight, computed = dtypes
    check(case(backend, weight, size), temperature=temperature, compute_dtype=computed)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 30.0, 1e19, 1e36])
def test_weights_of_any_size(backend, dtype, scale, temperature):
    """Also where products are denormal or overflow, and a token's own largest weight hides the others."""
    hidden, head, rows, rng = case(backend, FLOAT, (96, 1500))
    head.weight[5] *= 1000
    head.weight[:, 3] *= 100
    weight = (head.weight * scale).to(dtype)
    inputs = (hidden, head._replace(weight=weight, bias=head.bias * min(scale, 1)), rows, rng)
    check(inputs, temperature=temperature)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["hidden", "one weight", "token", "bias", "all biases", "excluded token"])
def test_values_that_are_not_finite(backend, where, value, temperature):
    hidden, head, rows, rng = case(backend, size=(40, 700))
    places = {
        "hidden": hidden.flatten(0, 1)[rows[4], 5:6],
        "one weight": head.weight[5, 3],
        "token": head.weight[6],
        "bias": head.bias[7],
        "all biases": head.bias,
        "excluded token": head.weight[head.excluded_token],
    }
    places[where].fill_(value)
    check((hidden, head, rows, rng), temperature=temperature)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab_size", [95, 700, 6145])
def test_memory_behind_the_head_is_no_token(backend, vocab_size, temperature):
    """Of finite rows whose squares overflow, so that nothing is bounded; what lies behind would win."""
    hidden, head, rows, rng = case(backend, FLOAT, (40, vocab_size + 40), excluded=False)
    head.weight[:vocab_size] *= 1e-3
    head.bias[vocab_size:] = 1e30
    for excluded in (-1, 3, vocab_size - 1):
        short = head._replace(
            weight=head.weight[:vocab_size], bias=head.bias[:vocab_size], excluded_token=excluded
        )
        inputs = (torch.full_like(hidden, 5e37), short._replace(norm=None), rows, rng)
        check(inputs, temperature=temperature)
        token = lk.sample_rows(*inputs, temperature=temperature, statistics=False).token
        assert (token < vocab_size).all() and (token != excluded).all()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("excluded", [-1, 0, 699])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_few_tokens_are_possible(backend, excluded, temperature):
    hidden, head, rows, rng = case(backend, size=(40, 700))
    bias = torch.full((700,), -math.inf)
    bias[[3, 300, 698]] = 0.0
    check((hidden, head._replace(bias=bias, excluded_token=excluded), rows, rng), temperature=temperature)


@pytest.mark.backends("cpu")
def test_ties_go_to_the_lowest_token(backend):
    """Of equal weights, whose bounds overlap."""
    hidden, head, rows, rng = case(backend, size=(40, 700), excluded=False)
    same = head.weight[:1].expand(700, -1).contiguous()
    inputs = (hidden, head._replace(weight=same, bias=torch.zeros(700)), rows, rng)
    check(inputs, temperature=0.0)
    assert not lk.sample_rows(*inputs, temperature=0.0, statistics=False).token.any()
    check(plain_case(backend, torch.zeros(3000), 50))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_errors_of_bytes_that_all_point_one_way(backend, temperature):
    """Rows of ones, and tokens whose weights are rounded all up or all down: the bound is reached."""
    num_rows, width, vocab_size = 20, 64, 900
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-3, 4, (vocab_size, width), generator=generator).float()
    whole[:, :2] = 0.0
    whole[:, 0] = 60 - whole.sum(1)  # the bytes say the same of all
    rest = torch.empty(vocab_size, 1).uniform_(-0.49, 0.49, generator=generator)
    weight = whole + rest.expand(-1, width).clone().index_fill(1, torch.tensor([0, 1]), 0.0)
    weight[:, 1] = 127.0  # sets the scale of a byte
    weight[5] = whole[5]  # a token whose bytes are exact, better by them and worse in truth
    weight[5, :2] = torch.tensor([float(whole[5, 0]) + 27, 127.0])
    hidden = torch.ones(1, num_rows, width)
    names = torch.arange(num_rows)
    head = Head(None, weight, torch.zeros(vocab_size), torch.zeros(1, 2, width))
    inputs = (hidden, head, names, RowRng(1, names, names, names))
    check(inputs, temperature=temperature)
    if temperature == 0:
        best = int(weight.sum(1).argmax())
        assert (lk.sample_rows(*inputs, temperature=0.0, statistics=False).token == best).all()


@pytest.mark.backends("cpu")
def test_batches_and_threads(backend, dtype, threads):
    inputs = case(backend, dtype, (40, 6300), num_rows=300)
    expected = lk.sample_rows(*inputs).token
    for number in (1, 2, 3):
        threads(number)
        for index in (slice(None), slice(7, 8), slice(100, 240)):
            token = lk.sample_rows(*some(inputs, index), statistics=False).token
            assert torch.equal(token, expected[index])


@pytest.mark.backends("best")
def test_a_weight_that_changes(backend):
    """Its bytes are made again."""
    hidden, head, rows, rng = case(backend)
    for _ in range(3):
        check((hidden, head, rows, rng))
        head.weight.mul_(-1.5)
    head.weight.data.add_(0.5)
    check((hidden, head, rows, rng))


@pytest.mark.backends("best")
def test_a_weight_that_is_not_contiguous_and_one_that_is_wide(backend, monkeypatch):
    hidden, head, rows, rng = case(backend)
    check((hidden, head._replace(weight=head.weight.T.contiguous().T), rows, rng))
    monkeypatch.setattr(_C, "MOST_QUANTIZED_WIDTH", 20)
    check((hidden, head, rows, rng))


@pytest.mark.backends("best")
def test_most_logits_are_never_computed(backend):
    """What cannot win could hold anything: here, behind the bytes' back, the weights of most tokens."""
    hidden, head, rows, rng = case(backend, size=(64, 3000), excluded=False)
    bias = torch.full((3000,), -50.0)
    bias[[5, 1000, 2999]] = 0.0
    head = head._replace(bias=bias)
    before = lk.sample_rows(hidden, head, rows, rng, statistics=False).token
    assert len(before.unique()) == 3
    operands, quantized = on_cpu.token_operands(SampleCall(hidden, head, None, rows, Draw(rng)))
    damaged = torch.full_like(head.weight, math.nan)
    damaged[[5, 1000, 2999]] = head.weight[[5, 1000, 2999]]
    token, finite = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.bool)
    names = (rng.seed, rng.sequence, rng.step, rng.position)
    _C.sample_tokens(*operands[:5], damaged, *operands[6:], quantized, -1, *names, 1.0, 1, token, finite)
    assert torch.equal(token, before) and finite.all()


@pytest.mark.backends("reference")
def test_bad_input(backend):
    with pytest.raises(TypeError, match="statistics: got 1, expected a bool"):
        lk.sample_rows(*case(backend), statistics=1)
