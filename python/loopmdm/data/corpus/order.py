"""Which sequence comes when: permutations and mixtures that are computed where needed, never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

CYCLE = 4096  # sequences in which every corpus has its share
_ROUNDS = 6
_STREAM = 0x4D4958  # "MIX": keeps these numbers apart from every other use of the same seed


def shuffled(places: Ints, size: int, seed: int, source: int, epochs: Ints) -> Ints:
    """Where a permutation of 0..size-1 takes places [R]; one permutation for each (seed, source, epoch).

    A Feistel network over the next even number of bits; what falls outside is sent through again until it
    does not, which keeps it a permutation (cycle walking: Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, math.ceil(math.log2(max(size, 2)) / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [_mixed(_mixed(epochs.astype(np.uint64)) + _key(seed, source, i)) for i in range(_ROUNDS)]
    values = places.astype(np.uint64)
    outside = np.ones(len(places), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key[outside]) & mask)
        values[outside] = (left << half) | right
        outside = values >= size
    return values.astype(np.int64)


class Mixture:
    """Which corpus the sequence at a position comes from, and the how-manieth of that corpus it is."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
            raise ValueError(f"weights is {list(weights)}; accepted: finite numbers above 0")
        exact = np.array(weights, float) / math.fsum(weights) * CYCLE
        quotas = np.floor(exact).astype(np.int64)
        # The largest remainders get what is left.
        quotas[np.argsort(quotas - exact, kind="stable")[: CYCLE - int(quotas.sum())]] += 1
        if not quotas.all():
            raise ValueError(f"weights is {list(weights)}; accepted: each at least 1/{CYCLE} of their sum")
        self._quotas, self._seed = quotas, seed
        self._starts = np.cumsum([0, *quotas])
        self._last: tuple[int, Ints, Ints] | None = None

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """(corpus, number within the corpus), each [R], of positions [R]."""
        cycles, places = np.divmod(positions, CYCLE)
        sources = np.empty(len(positions), np.int64)
        ranks = np.empty(len(positions), np.int64)
        for cycle in np.unique(cycles).tolist():
            here = cycles == cycle
            of_cycle, in_cycle = self._cycle(cycle)
            sources[here], ranks[here] = of_cycle[places[here]], in_cycle[places[here]]
        return sources, cycles * self._quotas[sources] + ranks

    def counts(self, positions: int) -> list[int]:
        """How many of the first positions come from each corpus."""
        cycles, rest = divmod(positions, CYCLE)
        sources, _ = self._cycle(cycles)
        last = np.bincount(sources[:rest], minlength=len(self._quotas))
        counted: list[int] = (cycles * self._quotas + last).tolist()
        return counted

    def _cycle(self, cycle: int) -> tuple[Ints, Ints]:
        """(corpus, rank among those of the same corpus in the cycle), each [CYCLE]."""
        if self._last is None or self._last[0] != cycle:
            self._last = cycle, *self._made(cycle)
        return self._last[1:]

    def _made(self, cycle: int) -> tuple[Ints, Ints]:
        place = np.arange(CYCLE, dtype=np.int64)
        if len(self._quotas) == 1:
            return np.zeros(CYCLE, np.int64), place
        # A slot belongs to a corpus; the sequences of a corpus keep their order.
        slots = shuffled(place, CYCLE, self._seed, -1, np.full(CYCLE, cycle, np.int64))
        sources = np.searchsorted(self._starts, slots, side="right") - 1
        ranks = np.empty(CYCLE, np.int64)
        for source, quota in enumerate(self._quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks


def _key(seed: int, source: int, number: int) -> Words:
    key: Words = np.zeros(1, np.uint64)
    for digit in np.array([[seed], [source % 2**64], [_STREAM + number]], np.uint64):
        key = _mixed(key + digit)
    return key


def _mixed(words: Words) -> Words:
    """splitmix64 (Steele, Lea and Flood, 2014) of each word; overflow is meant."""
    mixed: Words = words + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
