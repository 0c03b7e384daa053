"""Documents out of files and folders, and their split in two."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Literal

from loopmdm.data.files import STDLIB, DataFile, Found, LeftOut, Source, find_files, listed
from loopmdm.data.raw import Errors
from loopmdm.data.records import NotText, documents_of

__all__ = [
    "STDLIB",
    "Source",
    "content_hash",
    "cut_document",
    "documents_in",
    "found_files",
    "read_documents",
    "split_documents",
]

_FEW_DOCUMENTS = 20
_PIECES = 200
_SMALLEST_PIECE = 1000


def read_documents(
    source: Source | Iterable[Source],
    *,
    text_field: str = "text",
    suffixes: str | Iterable[str] | None = None,
    errors: Literal["strict", "replace"] = "strict",
) -> Iterator[str]:
    """The documents of files and folders, in a fixed order; empty ones are left out.

    A text file is one document; a line of .jsonl, .ndjson or .jsonlines, a record of .json, a row of .csv,
    .tsv, .parquet, .arrow or .feather is one (its field `text_field`). Files may be compressed (gzip, bzip2,
    xz, zstd), and text may be UTF-16 or UTF-32 with a byte order mark. Folders are read recursively in sorted
    order, without hidden and binary files; `find_files` has the details, and docs/inputs.md all forms. The
    name "stdlib" stands for the sources of the Python standard library without its tests ("./stdlib" is a
    folder of that name). What is left out is told in warnings after the last document.

    Args:
        source: a path, a pattern such as "data/**/*.txt", or several.
        text_field: field or column that holds the text.
        suffixes: take only these files out of folders, for instance (".txt", ".md"); None takes all.
        errors: "strict" makes bytes that are not UTF-8, and halves of surrogate pairs in JSON, an error;
            "replace" turns them into U+FFFD.

    Raises:
        FileNotFoundError: a path does not exist (raised here, before the first document).
        ValueError: a folder without files, bad JSON or CSV, a missing field, bytes that are not UTF-8,
            damaged compression, no text; it has the file and the line or row.
        ImportError: a file that needs pyarrow (.parquet, .arrow) or zstandard, and it is not installed.
    """
    found = found_files(source, suffixes)
    return _warn_at_the_end(documents_in(found, text_field, errors), found)


def found_files(source: Source | Iterable[Source], suffixes: str | Iterable[str] | None = None) -> Found:
    """The files that `read_documents` reads."""
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise ValueError("source is empty; accepted: a path, 'stdlib', or several of them")
    return find_files(sources, _suffixes(suffixes))


def documents_in(found: Found, text_field: str = "text", errors: Errors = "strict") -> Iterator[str]:
    """The documents of files; those that turn out to hold none are moved to `found.left_out`."""
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors is {errors!r}; accepted: 'strict' or 'replace'")
    return _documents(found, text_field, errors)


def _documents(found: Found, text_field: str, errors: Errors) -> Iterator[str]:
    count = 0
    without: set[DataFile] = set()
    for file in found.files:
        try:
            for document in documents_of(file, text_field, errors):
                if document:
                    count += 1
                    yield document
        except NotText as error:
            if file.named:
                raise
            without.add(file)
            found.left_out.append(LeftOut(file.path, error.why, error.detail))
    found.files = [file for file in found.files if file not in without]
    if not count:
        empty = ": every document is empty" if found.files else ""
        raise ValueError("; ".join([f"no text in {listed(found.sources)}{empty}", *found.remarks()]))


def split_documents(
    documents: Iterable[str], validation: float = 0.05, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split documents into (train, validation) by a hash of their content.

    A document's side does not depend on the order or the number of the others, and equal documents land on
    the same side. If one side would stay empty it gets the document nearest to it. A corpus of fewer than 20
    documents (one long file, say) is first cut at line ends into about 200 pieces of 1000 or more characters.

    Args:
        documents: the corpus.
        validation: expected share of the documents in the validation set, 0 <= validation < 1.
        seed: another seed gives another split.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation is {validation}; accepted: 0 <= validation < 1")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; accepted: 0 to 2**64 - 1")
    corpus = list(documents)
    if not corpus:
        raise ValueError("documents is empty: there is nothing to split")
    if validation == 0:
        return corpus, []
    if len(corpus) < _FEW_DOCUMENTS:
        piece = max(_SMALLEST_PIECE, sum(map(len, corpus)) // _PIECES)
        corpus = [part for document in corpus for part in cut_document(document, piece)]
    hashes = [content_hash(d.encode("utf-8", "surrogatepass"), seed) for d in corpus]
    lowest, highest = min(hashes), max(hashes)
    if lowest == highest:
        raise ValueError(
            f"documents hold {len(corpus)} document(s) with one content: a split needs two different ones; "
            "give more text, or validation=0"
        )
    # The lowest hash always validates and the highest always trains, so no side is empty.
    held_out = [h == lowest or (h < validation * 2**64 and h != highest) for h in hashes]
    pairs = list(zip(corpus, held_out, strict=True))
    return [d for d, out in pairs if not out], [d for d, out in pairs if out]


def cut_document(document: str, max_chars: int) -> Iterator[str]:
    """Pieces of at most `max_chars` characters that join to the document, cut after line ends if possible."""
    if max_chars < 1:
        raise ValueError(f"max_chars is {max_chars}; accepted: at least 1")
    start = 0
    while start < len(document):
        end = start + max_chars
        if end < len(document):
            end = document.rfind("\n", start, end) + 1 or end
        yield document[start:end]
        start = end


def _suffixes(suffixes: str | Iterable[str] | None) -> set[str] | None:
    if suffixes is None:
        return None
    wanted = {suffix.lower() for suffix in ([suffixes] if isinstance(suffixes, str) else suffixes)}
    for suffix in wanted:
        if not suffix.startswith("."):
            raise ValueError(f"suffixes holds {suffix!r}; accepted: file suffixes such as '.txt'")
    return wanted


def _warn_at_the_end(documents: Iterator[str], found: Found) -> Iterator[str]:
    yield from documents
    for line in found.remarks(all_files=False):
        warnings.warn(line, stacklevel=2)


def content_hash(data: bytes, seed: int = 0) -> int:
    """64 bits of the content of a document, which say on which side of a split it lies."""
    digest = hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")
