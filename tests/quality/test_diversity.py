"""Diversity metrics against counts made by hand and by other code."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopmdm.quality import distinct_n, self_bleu, unigram_entropy


def padded(rows: list[list[int]]) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [-1] * (length - len(row)) for row in rows])


def grams(row: list[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))


def bleu(hypothesis: list[int], references: list[list[int]], n: int) -> float:
    """BLEU as its authors wrote it down, one sample at a time; method 1 of Chen & Cherry for empty orders."""
    product = 1.0
    for order in range(1, n + 1):
        mine = grams(hypothesis, order)
        theirs = [grams(reference, order) for reference in references]
        matches = sum(min(count, max(other[gram] for other in theirs)) for gram, count in mine.items())
        if order == 1 and matches == 0:
            return 0.0
        product *= (matches or 0.1) / max(1, len(hypothesis) - order + 1)
    nearest = sorted(map(len, references), key=lambda size: (abs(size - len(hypothesis)), size))[0]
    brevity = 1.0 if len(hypothesis) >= nearest else math.exp(1 - nearest / len(hypothesis))
    return brevity * product ** (1 / n)


ROWS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5))
def test_self_bleu_is_bleu_against_all_others(rows: list[list[int]], n: int) -> None:
    expected = [bleu(row, rows[:i] + rows[i + 1 :], n) for i, row in enumerate(rows)]
    assert self_bleu(padded(rows), n).tolist() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 3))
def test_entropy_and_distinct_by_counting(rows: list[list[int]], n: int) -> None:
    entropy = [-sum(c / len(row) * math.log(c / len(row)) for c in Counter(row).values()) for row in rows]
    assert unigram_entropy(padded(rows)).tolist() == pytest.approx(entropy, abs=1e-12)
    long = [row for row in rows if len(row) >= n]
    if long:
        expected = [len(grams(row, n)) / (len(row) - n + 1) for row in long]
        assert distinct_n(padded(long), n).tolist() == pytest.approx(expected, rel=1e-12)


def test_values_known_by_hand() -> None:
    tokens = torch.tensor([[7, 7, 7, 7], [0, 1, 2, 50256], [1, 2, 1, 2]])
    assert unigram_entropy(tokens).tolist() == pytest.approx([0.0, math.log(4), math.log(2)])
    assert distinct_n(tokens, 2).tolist() == pytest.approx([1 / 3, 1.0, 2 / 3])
    assert distinct_n(tokens, 3).tolist() == pytest.approx([1 / 2, 1.0, 1.0])
    assert self_bleu(torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])).tolist() == pytest.approx([1.0, 1.0])
    assert self_bleu(torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]])).tolist() == [0.0, 0.0]


def test_order_of_samples_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (40, 30), generator=generator)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(self_bleu(tokens)[order], self_bleu(tokens[order]))


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        ([[1, 2]], TypeError, "tokens: got list, expected a tensor of integers"),
        (torch.zeros(2, 3), TypeError, "got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"got shape \(3,\), expected \[N, L\]"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "with L of at least 1"),
        (torch.zeros(0, 3, dtype=torch.int64), ValueError, "got 0 samples, expected at least"),
        (torch.tensor([[1, 2], [-1, -1]]), ValueError, "sample 1 has no token"),
        (torch.tensor([[1, -1, 2], [1, 2, 3]]), ValueError, "sample 0 goes on behind a -1"),
        (torch.tensor([[1, -2], [1, 2]]), ValueError, "got the id -2"),
        (torch.tensor([[1, 2], [1, 9]]), ValueError, "sample 1 holds the mask 9 at position 1"),
    ],
)
def test_bad_samples(tokens: Tensor, error: type[Exception], message: str) -> None:
    for metric in (unigram_entropy, self_bleu, lambda x, **kw: distinct_n(x, 1, **kw)):
        with pytest.raises(error, match=message):
            metric(tokens, mask_token_id=9)


def test_bad_orders() -> None:
    with pytest.raises(ValueError, match="got 1 samples, expected at least 2"):
        self_bleu(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        self_bleu(torch.tensor([[1], [2]]), 0)
    with pytest.raises(ValueError, match="n: got 3, but sample 1 has 2 tokens"):
        distinct_n(torch.tensor([[1, 2, 3], [1, 2, -1]]), 3)
