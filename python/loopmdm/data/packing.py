"""Documents packed into sequences of one length, and training batches as a pure function of the step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopmdm.data.array_cache import Array, cached_arrays
from loopmdm.data.batches import Batch, BatchSource
from loopmdm.data.tokenizer import Tokenizer
from loopmdm_kernels.values import check_at_least

GROUP_SIZE = 1000  # documents that are concatenated before they are cut, as in the reference
_CACHE_VERSION = 2
_STREAM = 0x44415441  # "DATA": keeps the permutations apart from every other use of the same seed
_SCAN_ROWS = 4096


class TokenRows(Protocol):
    """Sequences [N, L] that are read by row: an array, or the shards of a corpus."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: NDArray[np.int64], /) -> Array: ...


def pack_wrapped(
    documents: Iterable[str], tokenizer: Tokenizer, length: int, *, group_size: int = GROUP_SIZE
) -> Array:
    """Pack documents without padding: integers [N, L], the reference's wrap=True.

    Each document gets an EOS; `group_size` documents are concatenated and cut into blocks of L - 2 tokens,
    each stored as BOS block EOS. The remainder of a group is dropped.
    """
    check_length(length)
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; accepted: at least 1")
    dtype = token_dtype(tokenizer.vocab_size)
    packed = [np.empty((0, length), dtype)]
    for group in _groups(documents, group_size):
        end = np.array([tokenizer.eos_token_id], dtype=np.int32)
        stream = np.concatenate([part for ids in tokenizer.encode_batch(group) for part in (ids, end)])
        rows = len(stream) // (length - 2)
        block = np.empty((rows, length), dtype)
        block[:, 0], block[:, -1] = tokenizer.bos_token_id, tokenizer.eos_token_id
        block[:, 1:-1] = stream[: rows * (length - 2)].reshape(rows, length - 2)
        packed.append(block)
    return np.concatenate(packed)


def pack_padded(documents: Iterable[str], tokenizer: Tokenizer, length: int) -> tuple[Array, Array]:
    """One document a row, as BOS document EOS: tokens [N, L] and the number of real tokens [N] int32.

    Longer documents are truncated to L - 2 tokens; shorter rows are filled with EOS, never with the mask.
    """
    check_length(length)
    dtype = token_dtype(tokenizer.vocab_size)
    tokens, lengths = [np.empty((0, length), dtype)], []
    for group in _groups(documents, GROUP_SIZE):
        block = np.full((len(group), length), tokenizer.eos_token_id, dtype)
        block[:, 0] = tokenizer.bos_token_id
        for row, ids in zip(block, tokenizer.encode_batch(group), strict=True):
            kept = ids[: length - 2]
            row[1 : 1 + len(kept)] = kept
            lengths.append(len(kept) + 2)
        tokens.append(block)
    return np.concatenate(tokens), np.array(lengths, dtype=np.int32)


class TextData:
    """Packed token sequences and the batches drawn from them.

    Each epoch visits every sequence once, in an order given by (seed, epoch). Element i of a batch stands at
    position ((step * accumulation + micro_step) * world_size + rank) * batch_size + i of that endless order,
    so none repeats within an epoch over ranks, micro-batches and steps, and a resumed run sees the batches it
    would have seen.
    """

    def __init__(
        self,
        tokens: TokenRows,
        *,
        vocab_size: int,
        mask_token_id: int,
        lengths: Array | None = None,
        seed: int = 0,
        accumulation: int = 1,
        batch_size: int = 32,
    ) -> None:
        """Take packed tokens; nothing is copied, so a memory map stays one.

        Args:
            tokens: integers [N, L], N >= 1.
            vocab_size: V of the model, mask included; every token must be below.
            mask_token_id: no token may equal it.
            lengths: integers [N], real tokens of each row if rows are padded.
            seed: of the order.
            accumulation: micro-batches of an optimizer step.
            batch_size: sequences of a batch where `batch` is not told otherwise.
        """
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
            raise ValueError(
                f"tokens is {tokens.dtype} {list(tokens.shape)}; accepted: integers [N, L], not empty"
            )
        if lengths is not None and (
            lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > tokens.shape[1]
        ):
            raise ValueError(
                f"lengths must be [{len(tokens)}] integers in 1..{tokens.shape[1]}, got {list(lengths.shape)}"
            )
        for name, value in (("accumulation", accumulation), ("batch_size", batch_size)):
            check_at_least(name, value, 1)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; accepted: 0 to 2**64 - 1")
        if isinstance(tokens, np.ndarray):  # those of a corpus were made by its tokenizer and have checksums
            _check_tokens(tokens, vocab_size, mask_token_id)
        self.tokens, self.lengths = tokens, lengths
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.seed, self.accumulation, self.batch_size = seed, accumulation, batch_size
        self._orders: dict[int, NDArray[np.int64]] = {}

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[str],
        tokenizer: Tokenizer,
        length: int,
        *,
        wrap: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        accumulation: int = 1,
        batch_size: int = 32,
    ) -> TextData:
        """Tokenise and pack documents, or read them packed from `cache_dir` if they were packed there before.

        wrap: pack without padding (`pack_wrapped`), else one document a row (`pack_padded`). A cache entry is
        found by content, tokenizer and packing; a damaged one is packed again, with a warning.
        """

        if isinstance(documents, str):
            raise TypeError("documents is a str; accepted: an iterable of documents")
        corpus = documents if cache_dir is None else list(documents)

        def pack() -> dict[str, Array]:
            if wrap:
                return {"tokens": pack_wrapped(corpus, tokenizer, length)}
            tokens, lengths = pack_padded(corpus, tokenizer, length)
            return {"tokens": tokens, "lengths": lengths}

        if cache_dir is None:
            arrays = pack()
        else:
            names = ("tokens",) if wrap else ("tokens", "lengths")
            key = _cache_key(corpus, tokenizer, length, wrap)
            arrays = cached_arrays(Path(cache_dir), key, names, pack)
        tokens = arrays["tokens"]
        if not len(tokens):
            raise ValueError(
                f"documents hold fewer than length - 2 = {length - 2} tokens: not one sequence of length "
                f"{length}; give more text or a smaller length"
            )
        return cls(
            tokens,
            vocab_size=tokenizer.vocab_size,
            mask_token_id=tokenizer.mask_token_id,
            lengths=arrays.get("lengths"),
            seed=seed,
            accumulation=accumulation,
            batch_size=batch_size,
        )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """L."""
        return int(self.tokens.shape[1])

    def batch(
        self,
        step: int,
        micro_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(input_ids int64 [B, L], attention_mask bool [B, L] or None without padding); a pure function."""
        size = self.batch_size if batch_size is None else batch_size
        check_at_least("batch_size", size, 1)
        check_at_least("step", step, 0)
        check_at_least("world_size", world_size, 1)
        limits = (
            ("micro_step", micro_step, self.accumulation, "accumulation"),
            ("rank", rank, world_size, "world_size"),
        )
        for name, value, limit, source in limits:
            if not 0 <= value < limit:
                raise ValueError(f"{name} is {value}; accepted: 0 to {source} - 1 = {limit - 1}")
        start = ((step * self.accumulation + micro_step) * world_size + rank) * size
        return self._gather(self._rows_at(start, size))

    def source(self, accumulation: int) -> BatchSource:
        """The batches as a trainer asks for them, which has to accumulate as many micro-batches."""
        self._check_accumulation(accumulation)
        return lambda *place: Batch(*self.batch(*place))

    def rows(self, rows: NDArray[np.int64]) -> Batch:
        """Rows [R] in stored order, in the form of a batch: for evaluation."""
        return Batch(*self._gather(rows))

    def _check_accumulation(self, accumulation: int) -> None:
        if self.accumulation != accumulation:
            raise ValueError(
                f"data was made for accumulation {self.accumulation}, the run accumulates {accumulation}"
                " micro-batches: sequences would be skipped or repeated"
            )

    def examples(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Sequences start..stop-1 in stored order, in the form of `batch`: for evaluation."""
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"start, stop are {start}, {stop}; accepted: 0 <= start < stop <= {len(self)}")
        return self._gather(np.arange(start, stop))

    def _rows_at(self, start: int, count: int) -> NDArray[np.int64]:
        """The sequences at positions start..start+count-1 of the endless order."""
        rows = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, position = divmod(start + filled, len(self))
            part = self._order(epoch)[position : position + count - filled]
            rows[filled : filled + len(part)] = part
            filled += len(part)
        return rows

    def _gather(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        input_ids = torch.from_numpy(self.tokens[rows].astype(np.int64))
        if self.lengths is None:
            return input_ids, None
        return input_ids, torch.from_numpy(np.arange(self.length) < self.lengths[rows][:, None])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of an epoch, from sorted raw Philox words: the same in every version of numpy."""
        if epoch not in self._orders:
            words = np.random.Philox(
                key=np.array([self.seed, _STREAM], dtype=np.uint64),
                counter=np.array([0, epoch, 0, 0], dtype=np.uint64),
            ).random_raw(len(self))
            order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
            # A batch spans two epochs at most times; older orders are not needed again.
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}
        return self._orders[epoch]


def _groups(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(documents)
    while group := list(islice(iterator, size)):
        yield group


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Of the tokens of a vocabulary, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")


def check_length(length: int) -> None:
    """Raise a `ValueError` where BOS, EOS and a token do not fit."""
    check_at_least("length", length, 3)


def _check_tokens(tokens: Array, vocab_size: int, mask_token_id: int) -> None:
    for first in range(0, len(tokens), _SCAN_ROWS):
        chunk = tokens[first : first + _SCAN_ROWS]
        for wrong, accepted in (
            (chunk == mask_token_id, f"ids other than the mask id {mask_token_id}"),
            ((chunk < 0) | (chunk >= vocab_size), f"0 to vocab_size - 1 = {vocab_size - 1}"),
        ):
            if wrong.any():
                row, column = (int(i[0]) for i in np.nonzero(wrong))
                raise ValueError(
                    f"tokens[{first + row}, {column}] is {chunk[row, column]}; accepted: {accepted}. "
                    "Data and model must share the tokenizer"
                )


def _cache_key(documents: Iterable[str], tokenizer: Tokenizer, length: int, wrap: bool) -> str:
    settings = [_CACHE_VERSION, tokenizer.fingerprint, length, wrap, GROUP_SIZE if wrap else 0]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return f"packed-{digest.hexdigest()}"
