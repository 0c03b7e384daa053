"""Prompts and responses, for supervised fine-tuning: prompts are given, responses are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopmdm.data.batches import Batch, BatchSource
from loopmdm.data.files import TEXT, DataFile, Found, Source
from loopmdm.data.packing import TextData, check_length, token_dtype
from loopmdm.data.raw import CHOOSE, Errors
from loopmdm.data.records import documents_of
from loopmdm.data.text import content_hash, found_files
from loopmdm.data.tokenizer import Tokenizer

FIELDS = ("prompt", "response")


class Pair(NamedTuple):
    """A prompt and what a model should answer."""

    prompt: str
    response: str


def read_pairs(
    source: Source | Iterable[Source] | Found,
    fields: tuple[str, str] = FIELDS,
    *,
    errors: Errors = "strict",
) -> Iterator[Pair]:
    """The pairs of files of records: JSON lines, JSON, tables, parquet, arrow; compressed or not.

    Args:
        source: a path, a pattern, several, or what `found_files` gives.
        fields: the fields or columns of prompt and response.
        errors: of bytes that are not UTF-8, as in `read_documents`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file of plain text; otherwise as `read_documents`, with file and line; an empty
            response; not one pair.
    """
    found = source if isinstance(source, Found) else found_files(source)
    count = 0
    for file in found.files:
        if file.kind == TEXT:
            raise ValueError(
                f"{file.path} is plain text; accepted: JSON lines or a table with the fields {fields[0]!r}"
                f" and {fields[1]!r}"
            )
        # Each field is read by itself: every kind of file can give one.
        columns = [_field_of(file, name, errors) for name in fields]
        for number, pair in enumerate(zip_longest(*columns)):
            if None in pair:
                raise ValueError(f"{file.path}: fields {fields[0]!r} and {fields[1]!r} differ in number")
            if not pair[1]:
                raise ValueError(f"{file.path}, record {number}: field {fields[1]!r} is empty")
            count += 1
            yield Pair(*pair)
    if not count:
        raise ValueError("; ".join(["the sources hold no pair", *found.remarks()]))


def _field_of(file: DataFile, name: str, errors: Errors) -> Iterator[str]:
    try:
        yield from documents_of(file, name, errors)
    except ValueError as error:
        if not str(error).endswith(CHOOSE):
            raise
        why = str(error).removesuffix(CHOOSE)
        raise ValueError(f"{why}choose two with fields, or --pairs FIELD FIELD") from error


def split_pairs(pairs: Iterable[Pair], validation: float) -> tuple[list[Pair], list[Pair]]:
    """(train, validation): pairs with the same prompt lie on the same side, by a hash of it."""
    if not 0 <= validation < 1:
        raise ValueError(f"validation is {validation}; accepted: 0 <= validation < 1")
    sides: tuple[list[Pair], list[Pair]] = [], []
    for pair in pairs:
        held_out = content_hash(pair.prompt.encode("utf-8", "surrogatepass")) < validation * 2**64
        sides[held_out].append(pair)
    return sides


class PairData(TextData):
    """Rows of BOS prompt response EOS, and the batches drawn from them.

    A batch is as long as the longest of the pairs that all ranks see together. Shorter ones are filled with
    EOS, which belongs to the response and is learned, so that a model says where an answer ends on a canvas
    that is longer (LLaDA, Nie et al. 2025, section 2.3). BOS and the prompt are given: never masked, not
    counted.

    Attributes:
        dropped: pairs left out because their prompt leaves no room for a token of the response.
        cut: pairs whose response was cut at the end.
    """

    lengths: NDArray[np.int32]

    def __init__(
        self,
        pairs: Iterable[Pair],
        tokenizer: Tokenizer,
        length: int,
        *,
        seed: int = 0,
        accumulation: int = 1,
        batch_size: int = 32,
    ) -> None:
        """Tokenise pairs; prompt and response each by itself.

        Args:
            pairs: at least one that fits.
            tokenizer: of the model.
            length: L, most tokens of a row with BOS and EOS.
            seed, accumulation, batch_size: as in `TextData`.

        Raises:
            ValueError: no pair fits.
        """
        check_length(length)
        pairs = list(pairs)
        prompts = tokenizer.encode_batch([pair.prompt for pair in pairs])
        responses = tokenizer.encode_batch([pair.response for pair in pairs])
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= length - 3]
        self.dropped, self.cut = len(pairs) - len(fitting), 0
        if not fitting:
            raise ValueError(
                f"none of {len(pairs)} pair(s) fits: a prompt may have at most length - 3 = {length - 3}"
                " tokens; give more pairs or a larger length"
            )
        rows = np.full((len(fitting), length), tokenizer.eos_token_id, token_dtype(tokenizer.vocab_size))
        rows[:, 0] = tokenizer.bos_token_id
        lengths = np.empty(len(fitting), np.int32)
        self.prompts: NDArray[np.int32] = np.empty(len(fitting), np.int32)  # given tokens of each row
        for row, i in enumerate(fitting):
            ids = np.concatenate([prompts[i], responses[i]])
            self.cut += len(ids) > length - 2
            ids = ids[: length - 2]
            rows[row, 1 : 1 + len(ids)] = ids
            self.prompts[row], lengths[row] = 1 + len(prompts[i]), len(ids) + 2
        super().__init__(
            rows,
            vocab_size=tokenizer.vocab_size,
            mask_token_id=tokenizer.mask_token_id,
            lengths=lengths,
            seed=seed,
            accumulation=accumulation,
            batch_size=batch_size,
        )

    def source(self, accumulation: int) -> BatchSource:
        """The batches as a trainer asks for them."""
        self._check_accumulation(accumulation)

        def batch(step: int, micro_step: int, rank: int, world_size: int, batch_size: int) -> Batch:
            # The length is that of all ranks, so that it does not depend on their number.
            together = batch_size * world_size
            first = (step * self.accumulation + micro_step) * together
            rows = self._rows_at(first, together)
            longest = int(self.lengths[rows].max())
            return self._padded(rows[rank * batch_size : (rank + 1) * batch_size], longest)

        return batch

    def _gather(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        raise TypeError(
            "batch and examples give no prompt_mask, without which prompts would be learned too: use"
            " source(accumulation) or rows(rows)"
        )

    def rows(self, rows: NDArray[np.int64]) -> Batch:
        """Rows [R] in the form of a batch."""
        return self._padded(rows, int(self.lengths[rows].max()))

    def _padded(self, rows: NDArray[np.int64], longest: int) -> Batch:
        ids: Tensor = torch.from_numpy(self.tokens[rows][:, :longest].astype(np.int64))
        given = torch.from_numpy(np.arange(longest) < self.prompts[rows][:, None])
        return Batch(ids, prompt_mask=given)
