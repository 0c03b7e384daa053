"""How varied samples are: within one (unigram entropy, distinct n-grams) and among each other (self-BLEU)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm.quality.samples import check_samples, lengths
from loopmdm_kernels.values import positive

SMOOTHING = 0.1  # matches an order without any is credited with (Chen & Cherry 2014, method 1)


def unigram_entropy(tokens: Tensor, *, mask_token_id: int | None = None) -> Tensor:
    """H = -sum over v of (c_v / L) log(c_v / L) of each sample, [N] float64, nats; c_v counts token v in it.

    tokens: [N, L] integers, -1 behind the end of a sample. mask_token_id: raise where a sample holds it.
    """
    tokens = check_samples(tokens, mask_token_id)
    sizes = lengths(tokens).double()
    grams = _ngrams(tokens, 1)
    share = grams.counts / sizes[grams.samples]
    return torch.zeros_like(sizes).index_add_(0, grams.samples, -share * share.log())


def distinct_n(tokens: Tensor, n: int, *, mask_token_id: int | None = None) -> Tensor:
    """Distinct n-grams of each sample over all its n-grams, [N] float64 in (0, 1].

    Counted within a sample, so the mean does not fall with the number of samples, as it does where all
    samples are counted together (Li et al. 2016); it does fall with their length.

    Raises:
        ValueError: a sample has fewer than n tokens.
    """
    tokens = check_samples(tokens, mask_token_id)
    positive("n", n)
    total = lengths(tokens) - n + 1
    if int(total.min()) < 1:
        raise ValueError(
            f"n: got {n}, but sample {int(total.argmin())} has {int(total.min()) + n - 1} tokens:"
            f" distinct-{n} is of samples with {n} or more"
        )
    distinct = torch.bincount(_ngrams(tokens, n).samples, minlength=len(tokens))
    return distinct.double() / total


def self_bleu(tokens: Tensor, n: int = 4, *, mask_token_id: int | None = None) -> Tensor:
    """BLEU-n of each sample with all other samples as references (Zhu et al. 2018), [N] float64 in 0..1.

    High where samples resemble each other. Uniform weights over the orders 1..n, counts clipped at the
    largest count in one reference, brevity penalty against the nearest length (the shorter of two as near).
    Smoothing is method 1 of Chen & Cherry 2014, NLTK's `SmoothingFunction().method1`: an order without a
    match counts as 0.1 matches; without a single matching token the score is 0. All references are used.

    Raises:
        ValueError: fewer than two samples.
    """
    tokens = check_samples(tokens, mask_token_id, least=2)
    positive("n", n)
    sizes = lengths(tokens)
    log_precision = torch.zeros(len(tokens), dtype=torch.float64)
    for order in range(1, n + 1):
        matches = _clipped_matches(tokens, order).double()
        if order == 1:
            empty = matches == 0
        # As in NLTK, an order longer than the sample has the denominator 1.
        total = (sizes - order + 1).clamp(min=1)
        log_precision += torch.where(matches > 0, matches, SMOOTHING).div(total).log() / n
    scores = (log_precision + _brevity(sizes)).exp()
    return torch.where(empty, 0.0, scores)


class _Grams(NamedTuple):
    """How often each distinct n-gram of a sample occurs in it; an entry is an (n-gram, sample)."""

    ids: Tensor  # int64, a number for the n-gram
    samples: Tensor  # int64
    counts: Tensor  # int64


def _ngrams(tokens: Tensor, n: int) -> _Grams:
    num, length = tokens.shape
    vocab = int(tokens.max()) + 1
    ids = tokens
    for order in range(2, n + 1):
        if order > length:
            none = torch.empty(0, dtype=torch.int64)
            return _Grams(none, none, none)
        # Numbers of (n-1)-grams are dense, so this stays far below 2^63.
        wider = ids[:, :-1] * vocab + tokens[:, order - 1 :]
        wider[(ids[:, :-1] < 0) | (tokens[:, order - 1 :] < 0)] = -1
        ids = torch.unique(wider, return_inverse=True)[1]
        if bool((wider < 0).any()):
            ids -= 1  # -1, the smallest, keeps its place
    rows = torch.arange(num)[:, None].expand_as(ids)
    inside = ids >= 0
    keys, counts = torch.unique(ids[inside] * num + rows[inside], return_counts=True)
    return _Grams(keys // num, keys % num, counts)


def _clipped_matches(tokens: Tensor, n: int) -> Tensor:
    """Sum over a sample's n-grams of min(its count, the largest count in one other sample), [N]."""
    grams = _ngrams(tokens, n)
    matches = torch.zeros(len(tokens), dtype=torch.int64)
    if not len(grams.ids):
        return matches
    ids = torch.unique_consecutive(grams.ids, return_inverse=True)[1]
    # The largest and the second largest count of an n-gram: a sample is clipped at the largest of the others.
    ascending = torch.argsort(grams.counts, stable=True)
    order = ascending[torch.argsort(ids[ascending], stable=True)]
    last = torch.bincount(ids).cumsum(0) - 1
    first = torch.cat([torch.zeros(1, dtype=torch.int64), last[:-1] + 1])
    best = order[last]
    second = torch.where(last > first, grams.counts[order[(last - 1).clamp(min=0)]], 0)
    of_others = torch.where(best[ids] == torch.arange(len(ids)), second[ids], grams.counts[best][ids])
    return matches.index_add_(0, grams.samples, torch.minimum(grams.counts, of_others))


def _brevity(sizes: Tensor) -> Tensor:
    """Logarithm of the brevity penalty of each sample against the others' lengths, [N]."""
    penalty = torch.zeros(len(sizes), dtype=torch.float64)
    values, counts = torch.unique(sizes, return_counts=True)
    for size, count in zip(values.tolist(), counts.tolist(), strict=True):
        others = values if count > 1 else values[values != size]
        _, nearest = min((abs(other - size), other) for other in others.tolist())
        if nearest > size:
            penalty[sizes == size] = 1 - nearest / size
    return penalty
