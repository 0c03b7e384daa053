"""Text on the command line: split, tokenised, packed, and the windows it is evaluated on."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loopmdm.data import corpus as corpora
from loopmdm.data.batches import Batch
from loopmdm.data.corpus.build import has_shards
from loopmdm.data.files import Found, listed
from loopmdm.data.packing import TextData
from loopmdm.data.pairs import Pair, PairData, read_pairs, split_pairs
from loopmdm.data.raw import Errors
from loopmdm.data.records import NotText, documents_of
from loopmdm.data.text import STDLIB, documents_in, found_files, split_documents
from loopmdm.data.tokenizer import CONFIG_FILE as TOKENIZER_FILE
from loopmdm.data.tokenizer import BPETokenizer, Tokenizer, load_tokenizer
from loopmdm.model.masks import counted_tokens
from loopmdm.printable import printable_lines
from loopmdm.runs.options import UsageError, of_option
from loopmdm.terminal import note, note_waiting

__all__ = [
    "STREAM_FOLDER",
    "TOKENIZER_FILE",
    "Corpus",
    "TextData",
    "Windows",
    "are_corpora",
    "as_list",
    "check_apart",
    "corpus_tokenizer",
    "fingerprint",
    "load_tokenizer",
    "located",
    "make_tokenizer",
    "named",
    "open_corpora",
    "pack",
    "read_corpus",
    "windows",
]

_BATCH = 16
STREAM_FOLDER = "corpus"  # in the folder of a run: what it has tokenised beside training
# Text that a bpe:VOCAB is trained on where a corpus is not read at once: the first documents of files spread
# over it.
_SAMPLE_CHARS, _SAMPLE_FILES = 2**26, 64


def located(data: str | list[str]) -> str | list[str]:
    """The same sources under names that do not depend on the working directory."""
    return _absolute(data) if isinstance(data, str) else [_absolute(source) for source in data]


def _absolute(source: str) -> str:
    if source == STDLIB:
        return source
    is_pattern = glob.has_magic(source) and not os.path.lexists(source) and not os.path.isabs(source)
    return os.path.join(glob.escape(os.getcwd()), source) if is_pattern else os.path.abspath(source)


def named(data: str | list[str]) -> str:
    """Sources as a message has them."""
    return data if isinstance(data, str) else listed(data)


def as_list(data: str | list[str]) -> list[str]:
    """Sources one by one."""
    return [data] if isinstance(data, str) else data


def check_apart(option: str, folder: Path, data: str | list[str], *, itself: bool = False) -> None:
    """Refuse to write into a folder that is read, where what is written would be among the data.

    option: that names the folder. itself: refuse the folders of the data alone, not those in them, as for a
        run, which is left out where folders are read.

    Raises:
        UsageError: it is one.
    """
    target = Path(os.path.realpath(folder))
    for source in as_list(data):
        if Path(source).is_dir() and target == Path(os.path.realpath(source)):
            raise UsageError(f"{option}: {source} is the folder of --data; choose another one to write into")
        if not itself and _reads(source, target):
            raise UsageError(
                f"{option}: {folder} is among the files of --data {source}; choose another place to write to"
            )


def _reads(source: str, folder: Path) -> bool:
    """Whether a source has the files of a folder: one in another, but a hidden one, or of a pattern."""
    if source == STDLIB:
        return False
    if not Path(source).is_dir():
        return any(fnmatch(str(path), source) for path in (folder, *folder.parents))
    place = Path(os.path.realpath(source))
    if not folder.is_relative_to(place):
        return False
    return not any(part.startswith(".") for part in folder.relative_to(place).parts)


def are_corpora(data: str | list[str] | None) -> bool:
    """Whether the sources are folders that `loopmdm data build` made.

    Raises:
        UsageError: some are, and others are not.
    """
    sources = [] if data is None else as_list(data)
    built = [source for source in sources if corpora.is_corpus(source)]
    if built and len(built) < len(sources):
        other = next(source for source in sources if source not in built)
        raise UsageError(
            f"--data: {built[0]} is a corpus and {other} is not; build one of it with `loopmdm data build`"
        )
    return bool(built)


def open_corpora(data: str | list[str] | None) -> list[corpora.Corpus]:
    """The corpora in folders that `are_corpora` has found."""
    assert data is not None
    return [corpora.Corpus(source) for source in as_list(data)]


class Corpus(NamedTuple):
    train: list[str]
    validation: list[str]


class Windows(NamedTuple):
    """Sequences to evaluate on, and the bytes of text behind one of their tokens."""

    batches: list[Batch]
    bytes_per_token: float


def read_corpus(
    data: str | list[str], text_field: str, errors: str, validation: float, *, quiet: bool = False
) -> Corpus:
    """The documents of `data`; a share `validation` of them is held out, by a hash of their content.

    quiet: do not say which files were read and which were not, and why.
    """
    for source in as_list(data):
        if corpora.is_corpus(source):
            raise ValueError(f"{source} is a corpus of `loopmdm data build`; give the files it was made of")
    found = found_files(data)
    for file in found.files:
        note_waiting(file.path)
    documents = list(documents_in(found, text_field, "replace" if errors == "replace" else "strict"))
    if not quiet:
        for line in (f"read: {found.read()}", *found.remarks()):
            note(printable_lines(line))
    return Corpus(*split_documents(documents, validation))


class Pairs(NamedTuple):
    """Prompts and responses, split, before there is a tokenizer."""

    train: list[Pair]
    validation: list[Pair]

    @property
    def texts(self) -> list[str]:
        """What a tokenizer is trained on."""
        return [text for pair in self.train for text in pair]


def read_run_pairs(data: str | list[str], fields: list[str], errors: str, validation: float) -> Pairs:
    """The pairs of `data`; of a share `validation` of the prompts they are held out."""
    prompt, response = fields
    pairs = read_pairs(
        as_list(data), (prompt, response), errors="replace" if errors == "replace" else "strict"
    )
    return Pairs(*split_pairs(pairs, validation))


def pack_pairs(part: str, pairs: list[Pair], tokenizer: Tokenizer, length: int, **options: Any) -> PairData:
    """The pairs of one part; says what did not fit."""
    try:
        packed = PairData(pairs, tokenizer, length, **options)
    except ValueError as error:
        raise ValueError(f"the {part} part of the data: {error}") from error
    for number, what in (
        (packed.dropped, "left out, the prompt is too long"),
        (packed.cut, "cut"),
    ):
        if number:
            note(f"{part}: {number:,} of {len(pairs):,} pair(s) {what} for {length} tokens")
    return packed


def make_tokenizer(choice: str, documents: list[str]) -> Tokenizer:
    """ "byte", "bpe:VOCAB" (trained on the documents), or a tokenizer on disk or on the hub."""
    kind, _, size = choice.partition(":")
    with of_option("--tokenizer"):
        if kind != BPETokenizer.kind:
            return load_tokenizer(choice)
        if not size.isdecimal():
            raise UsageError(f"got {choice!r}, expected bpe:VOCAB, such as bpe:4096")
        tokenizer = BPETokenizer.train(documents, int(size))
    if tokenizer.vocab_size < int(size):
        note(f"note: the text has pairs for a vocabulary of {tokenizer.vocab_size:,} only, not {int(size):,}")
    return tokenizer


def corpus_tokenizer(
    choice: str, found: Found, folder: Path, text_field: str = "text", errors: Errors = "strict"
) -> Tokenizer:
    """That of the shards in a folder, if there are some, else a new one, trained on a sample of the files."""
    if has_shards(folder):
        return load_tokenizer(folder)
    if not choice.startswith(f"{BPETokenizer.kind}:"):
        return make_tokenizer(choice, [])
    sample = list(_sample(found, text_field, errors))
    if not any(sample):
        raise ValueError(f"no text in {listed(found.sources)}: every document is empty")
    return make_tokenizer(choice, sample)


def _sample(found: Found, text_field: str, errors: Errors) -> Iterator[str]:
    step = -(-len(found.files) // _SAMPLE_FILES)
    chosen = found.files[::step]
    for file in chosen:
        left = _SAMPLE_CHARS // len(chosen)
        try:
            for document in documents_of(file, text_field, errors):
                yield document[:left]
                left -= len(document)
                if left <= 0:
                    break
        except NotText:  # the build leaves it out as well
            if file.named:
                raise


def pack(
    part: str,
    documents: list[str],
    tokenizer: Tokenizer,
    length: int,
    cache: Path | None = None,
    **options: Any,
) -> TextData:
    """The documents of one part of a corpus, packed."""
    if not documents:
        raise ValueError(f"the {part} part of the data is empty; give more text")
    try:
        return TextData.from_documents(documents, tokenizer, length, cache_dir=cache, **options)
    except ValueError as error:
        raise ValueError(f"the {part} part of the data ({len(documents)} documents): {error}") from error


def fingerprint(*parts: TextData) -> str:
    """Changes whenever the packed tokens do."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr((part.tokens.dtype.str, part.tokens.shape)).encode())
        digest.update(np.ascontiguousarray(part.tokens).data)
        if isinstance(part, PairData):
            digest.update(part.prompts.data)
    return digest.hexdigest()


def windows(data: TextData, tokenizer: Tokenizer, most: int) -> Windows:
    """At most `most` sequences, spread evenly over the data."""
    rows = np.unique(np.linspace(0, len(data) - 1, min(most, len(data))).round().astype(int))
    batches = [data.rows(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
    num_bytes = num_tokens = 0
    for batch in batches:
        for ids, counted in zip(batch.input_ids, counted_tokens(*batch), strict=True):
            num_bytes += tokenizer.text_bytes(ids[counted].tolist())
            num_tokens += int(counted.sum())
    return Windows(batches, num_bytes / num_tokens)
