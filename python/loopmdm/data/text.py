"""Documents out of files: plain text, folders, JSON lines, parquet and arrow; and their split in two."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

Source: TypeAlias = "str | os.PathLike[str]"

STDLIB = "stdlib"  # source name of the Python standard library's own sources
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
_BINARY_PROBE = 8192  # a NUL byte this early marks a binary file, as in git
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

    A text file is one document, a line of a .jsonl file one (its field `text_field`), a row of a .parquet or
    .arrow file one (its column `text_field`; needs the package datasets). Folders are read recursively in
    sorted order, without hidden and binary files. The name "stdlib" stands for the sources of the Python
    standard library without its tests ("./stdlib" is a folder of that name).

    Args:
        source: a path or several.
        text_field: field or column that holds the text.
        suffixes: take only these files out of folders, for instance (".txt", ".md"); None takes all.
        errors: "strict" makes bytes that are not UTF-8 an error, "replace" turns them into U+FFFD.

    Raises:
        FileNotFoundError: a path does not exist (raised here, before the first document).
        ValueError: a folder without files, bad JSON, a missing field, bytes that are not UTF-8, no text.
        ImportError: a .parquet or .arrow file, and datasets is not installed.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors is {errors!r}; accepted: 'strict' or 'replace'")
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise ValueError("source is empty; accepted: a path, 'stdlib', or several of them")
    wanted = _suffixes(suffixes)
    # (file, was it named by the caller): a named file must be text, one found in a folder may be skipped
    files: list[tuple[Path, bool]] = []
    for item in sources:
        files += _files_of(item, wanted)
    return _documents(files, sources, text_field, errors)


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
    hashes = [_hash(document, seed) for document in corpus]
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


def _files_of(source: Source, wanted: set[str] | None) -> list[tuple[Path, bool]]:
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if not _STDLIB_EXCLUDED & set(f.relative_to(root).parts)]
        if not files:
            raise ValueError(
                f"source 'stdlib': no .py files under {root}, this Python comes without its sources"
            )
        return [(file, True) for file in sorted(files)]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"source {str(source)!r} does not exist; accepted: a file, a folder or 'stdlib'"
        )
    if not path.is_dir():
        return [(path, True)]
    found = sorted(_walk(path, wanted))
    if not found:
        kind = "no files" if wanted is None else f"no files ending in {', '.join(sorted(wanted))}"
        raise ValueError(f"folder {path} holds {kind}")
    return [(file, False) for file in found]


def _walk(folder: Path, wanted: set[str] | None) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        # What Dataset.save_to_disk leaves beside its .arrow files is not text.
        dataset = "state.json" in names and "dataset_info.json" in names
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or (dataset and suffix == ".json"):
                continue
            if wanted is None or suffix in wanted:
                yield Path(root, name)


def _documents(
    files: list[tuple[Path, bool]], sources: list[Source], text_field: str, errors: str
) -> Iterator[str]:
    count = skipped = 0
    for path, named in files:
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            documents = _json_lines(path, text_field, errors)
        elif suffix in _TABLE_SUFFIXES:
            documents = _table(path, _TABLE_SUFFIXES[suffix], text_field)
        else:
            data = path.read_bytes()
            nul = data.find(b"\0", 0, _BINARY_PROBE)
            if nul >= 0 and not named:
                skipped += 1
                continue
            if nul >= 0:
                raise ValueError(f"{path} is not a text file: NUL byte at offset {nul}")
            documents = iter([_decode(data, path, 0, errors)])
        for document in documents:
            if document:
                count += 1
                yield document
    if skipped:
        warnings.warn(f"{skipped} binary file(s) skipped", stacklevel=2)
    if not count:
        raise ValueError(f"no text in {', '.join(map(str, sources))}: every document is empty")


def _decode(data: bytes, path: Path, offset: int, errors: str) -> str:
    """`data`, which starts at byte `offset` of the file, as text; a byte order mark is dropped."""
    try:
        return data.decode("utf-8", errors).removeprefix("\ufeff" if offset == 0 else "")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ValueError(
            f"{path}: byte {data[error.start]:#04x} at offset {at} is not UTF-8; convert the file, "
            "or read it with errors='replace'"
        ) from None


def _json_lines(path: Path, text_field: str, errors: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset, errors)
            offset += len(line)
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a {type(record).__name__}; accepted: an object with a text field")
            yield _text_of(record, text_field, where)


def _table(path: Path, kind: str, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"reading {path} needs the package datasets: pip install 'loopmdm-kernels[train]'"
        ) from None
    try:
        rows = iter(
            datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)
        )
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as {kind}, row {number}: {error}") from error
        if row is None:
            return
        yield _text_of(row, text_field, f"{path}, row {number}")
        number += 1


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{where}: no field {text_field!r}; its fields: {known}; choose one with text_field")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_field!r} is a {type(text).__name__}; accepted: a string")
    return text


def _hash(document: str, seed: int) -> int:
    digest = hashlib.blake2b(
        document.encode("utf-8", "surrogatepass"), digest_size=8, key=seed.to_bytes(8, "little")
    ).digest()
    return int.from_bytes(digest, "little")
