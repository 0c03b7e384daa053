"""Training batches out of corpora: functions of the position, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loopmdm.data.array_cache import Array
from loopmdm.data.corpus.order import Mixture, shuffled
from loopmdm.data.corpus.store import Corpus, Shard
from loopmdm.data.packing import TextData, check_length

Rows = NDArray[np.int64]


class _Place(NamedTuple):
    corpus: Corpus
    shard: Shard


class CorpusRows:
    """Sequences of a length out of shards, in the form of an array [N, L] that is read row by row.

    A row is BOS, L - 2 tokens of a shard, EOS; what is left at the end of a shard is dropped, as the
    reference does at the end of a group of documents.
    """

    ndim = 2

    def __init__(self, corpora: Sequence[Corpus], part: str, length: int) -> None:
        check_length(length)
        first = corpora[0]
        for other in corpora[1:]:
            if other.index.tokenizer != first.index.tokenizer:
                raise ValueError(f"{other.folder} and {first.folder} were made with different tokenizers")
        self._places = [_Place(corpus, shard) for corpus in corpora for shard in corpus.shards(part)]
        self._ends = np.cumsum([0, *(place.shard.tokens // (length - 2) for place in self._places)])
        self._ids = first.tokenizer.bos_token_id, first.tokenizer.eos_token_id
        self.dtype = first.dtype
        self.shape = (int(self._ends[-1]), length)
        self.size = self.shape[0] * length

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> Array:
        """Rows [R] of them: [R, L]."""
        body = self.shape[1] - 2
        out = np.empty((len(rows), self.shape[1]), self.dtype)
        out[:, 0], out[:, -1] = self._ids
        shards = np.searchsorted(self._ends, rows, side="right") - 1
        for target, row, index in zip(out, rows, shards, strict=True):
            place, start = self._places[index], (row - self._ends[index]) * body
            target[1:-1] = place.corpus.read(place.shard, int(start), int(start + body))
        return out


class CorpusData(TextData):
    """The sequences of one corpus or of a mixture of several, and the batches drawn from them.

    Within an epoch of a corpus every sequence comes once, in an order given by (seed, corpus, epoch). Of a
    mixture, each run of 4096 sequences in a row holds every corpus in its share, to the nearest sequence; a
    small corpus with a large weight begins its next epoch while the others are still in their first. Element
    i of a batch stands at the position that `TextData` says, so a run that is resumed, also on another number
    of ranks with the same global batch, sees the sequences that it would have seen.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        length: int,
        *,
        part: str = "train",
        weights: Sequence[float] | None = None,
        seed: int = 0,
        accumulation: int = 1,
        batch_size: int = 32,
    ) -> None:
        """Take corpora of one tokenizer.

        Args:
            corpora: at least one.
            length: L, tokens of a sequence with BOS and EOS.
            part: "train", "validation" or "all".
            weights: shares of the corpora, positive, in any unit; None: by their numbers of sequences.
            seed, accumulation, batch_size: as in `TextData`.

        Raises:
            ValueError: different tokenizers; weights that do not fit; a corpus shorter than one sequence.
        """
        if not corpora:
            raise ValueError("corpora is empty; accepted: at least one corpus")
        self.sizes = [len(CorpusRows([corpus], part, length)) for corpus in corpora]
        for corpus, size in zip(corpora, self.sizes, strict=True):
            if not size:
                raise ValueError(
                    f"the {part} part of {corpus.folder} holds no sequence of length {length}: give more text"
                    " or a smaller length"
                )
        if weights is not None and len(weights) != len(corpora):
            raise ValueError(f"weights has {len(weights)} values for {len(corpora)} corpora")
        self._mixture = Mixture(self.sizes if weights is None else weights, seed)
        self._starts = np.cumsum([0, *self.sizes])
        super().__init__(
            CorpusRows(corpora, part, length),
            vocab_size=corpora[0].index.vocab_size,
            mask_token_id=corpora[0].tokenizer.mask_token_id,
            seed=seed,
            accumulation=accumulation,
            batch_size=batch_size,
        )

    def repeats(self, sequences: int) -> list[float]:
        """How often each corpus has been seen after so many sequences of all."""
        seen = self._mixture.counts(sequences)
        return [count / size for count, size in zip(seen, self.sizes, strict=True)]

    def _rows_at(self, start: int, count: int) -> Rows:
        sources, numbers = self._mixture.at(np.arange(start, start + count))
        rows = np.empty(count, np.int64)
        for source, size in enumerate(self.sizes):
            chosen = sources == source
            epochs, places = np.divmod(numbers[chosen], size)
            rows[chosen] = self._starts[source] + shuffled(places, size, self.seed, source, epochs)
        return rows
