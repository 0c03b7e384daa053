"""The kernel behind top_k and top_p draws the tokens of the reference, which sorts whole rows."""

import pytest
import torch

from loopmdm_kernels import _C
from loopmdm_kernels.calls import Draw
from loopmdm_kernels.cpu.sample_rows import draw_restricted
from loopmdm_kernels.reference import nucleus
from loopmdm_kernels.types import RowRng

SIZES = [1, 2, 33, 300, 513, 2000]


def names(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return RowRng(
        seed + 5,
        torch.randint(2**32, (num_rows,), generator=generator),
        torch.randint(2**30, (num_rows,), generator=generator),
        torch.randint(2**31, (num_rows,), generator=generator),
    )


def rows(vocab_size, kind, seed=0, num_rows=4):
    """Log-probabilities [R, V]."""
    generator = torch.Generator().manual_seed(vocab_size + seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    if kind == "ties":
        logits = logits.mul(2).round().div(2)
    elif kind == "equal":
        logits = torch.zeros_like(logits)
    elif kind == "wide":
        logits = 0.3 * logits - torch.log(2.7 + torch.arange(vocab_size))
    elif kind == "peaked":
        logits = 30 * logits
    elif kind == "forbidden":
        logits[:, 1::2] = -torch.inf
        logits[:, 4::5] = -1e30
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "wide", "peaked", "forbidden"])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_tokens_of_the_reference(isa, vocab_size, kind):
    log_probs = rows(vocab_size, kind)
    for number, temperature in enumerate((1.0, 0.3)):
        for top_p in (1.0, 1e-6, 0.5, 0.9999):
            for top_k in (None, 7, vocab_size // 2 + 1, 100_000):
                if top_p == 1.0 and top_k is None:
                    continue
                arguments = log_probs, Draw(names(len(log_probs), number), temperature, top_p, top_k)
                token = draw_restricted(*arguments)
                assert torch.equal(token, nucleus.draw_restricted(*arguments)), arguments[1]


@pytest.mark.parametrize("temperature", [1e-40, 1e-31, 1e-20, 1e20])
def test_extreme_temperatures(isa, temperature):
    for top_p, top_k in ((0.5, None), (1.0, 4), (0.7, 9)):
        arguments = rows(300, "normal"), Draw(names(4), temperature, top_p, top_k)
        assert torch.equal(draw_restricted(*arguments), nucleus.draw_restricted(*arguments))


def test_rows_of_nan(isa):
    log_probs = rows(3000, "normal")
    log_probs[2] = torch.nan
    for top_p, top_k in ((0.5, None), (1.0, 40), (0.5, 40)):
        arguments = log_probs, Draw(names(4), 1.0, top_p, top_k)
        token = draw_restricted(*arguments)
        assert torch.equal(token, nucleus.draw_restricted(*arguments)) and token[2] == 2999


def test_a_row_is_its_own_on_any_number_of_threads():
    log_probs, before = rows(3000, "wide", num_rows=40), torch.get_num_threads()
    rng = names(40)
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(draw_restricted(log_probs, Draw(rng, 1.0, 0.9)))
        assert all(torch.equal(result, results[0]) for result in results)
        for i in range(0, 40, 13):
            part = slice(i, i + 1)
            assert draw_restricted(log_probs[part], Draw(rng, 1.0, 0.9).of_rows(part))[0] == results[0][i]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("vocab_size", SIZES)
def test_largest_values(vocab_size):
    values = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(1)).mul(4).round().div(4)
    values[0, 0], values[1] = -torch.inf, 0.0
    for count in {1, vocab_size // 2 + 1, vocab_size}:
        out = torch.empty(4, count)
        _C.largest_values(values, 2, out)
        assert torch.equal(out, values.topk(count).values)


def test_bad_arguments():
    log_probs, rng = rows(30, "normal"), names(4)
    token = torch.empty(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"most: expected 1\.\.30, got 31"):
        _C.draw_restricted(log_probs, log_probs, None, 31, 1.0, 0, *rng[1:], 1.0, 1, token)
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        _C.draw_restricted(log_probs, log_probs, None, 3, 1.0, 0, *rng[1:], 0.0, 1, token)
    with pytest.raises(ValueError, match="out: expected at most 30 columns, got 31"):
        _C.largest_values(log_probs, 1, torch.empty(4, 31))
