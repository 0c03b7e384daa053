"""The files of a corpus: shards of tokens with checksums, and an index of them.

A shard is two files: NAME.bin, the tokens of whole documents, each followed by EOS, as little-endian uint16
or int32; and NAME.crc, the CRC-32 of every block of 64 KiB of it. The index corpus.json is written last: a
folder without it is no corpus.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopmdm.data.array_cache import Array
from loopmdm.data.packing import token_dtype
from loopmdm.data.tokenizer import Tokenizer, load_tokenizer
from loopmdm.formats.folders import read_json
from loopmdm_kernels.files import Content

INDEX_FILE = "corpus.json"
FORMAT = 1
BLOCK = 2**16  # bytes under one checksum
PARTS = ("train", "validation")


class DamagedCorpusError(ValueError):
    """Files of a corpus are missing or are not what was written."""


@dataclass(frozen=True)
class Shard:
    """One shard; `checksum` is the CRC-32 of its NAME.crc."""

    name: str
    part: str
    tokens: int  # EOS of each document among them
    documents: int
    text_bytes: int  # of the documents in UTF-8
    checksum: int


@dataclass(frozen=True)
class Index:
    """What corpus.json holds."""

    tokenizer: str  # its fingerprint
    vocab_size: int
    shards: tuple[Shard, ...]
    format: int = FORMAT
    made_of: dict[str, Any] = field(default_factory=dict)  # sources and settings, to be read by people

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


class Corpus:
    """A corpus that `build_corpus` made, opened to read; tokens stay on the disk.

    Attributes:
        tokenizer: of its tokens.
        index: counts and checksums of every shard.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a corpus; sizes and the tables of checksums are verified, tokens when they are first read.

        Raises:
            FileNotFoundError: the folder holds no corpus, or one that is not finished.
            DamagedCorpusError: a file is missing, or has another size or checksum; it names the file.
        """
        self.folder = Path(folder)
        if not is_corpus(self.folder):
            raise FileNotFoundError(
                f"{folder} holds no corpus: {INDEX_FILE} is missing; `loopmdm data build` writes it last"
            )
        self._open(read_index(self.folder / INDEX_FILE))

    def _open(self, index: Index) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.fingerprint != index.tokenizer:
            raise DamagedCorpusError(
                f"{self.folder}: the tokenizer beside the shards is not the one they were made with"
            )
        self.dtype = token_dtype(index.vocab_size)
        self._tables: dict[str, _Table] = {}
        self._maps: dict[str, Array] = {}
        self._take(index)

    def _take(self, index: Index) -> None:
        """An index of the shards there are, which may be more than before."""
        self.index = index
        new = [shard for shard in index.shards if shard.name not in self._tables]
        self._tables |= {shard.name: self._table(shard) for shard in new}

    @property
    def digest(self) -> str:
        """Changes whenever a token does."""
        seen = [[s.part, s.tokens, s.checksum] for s in self.index.shards]
        return hashlib.blake2b(json.dumps([self.index.tokenizer, seen]).encode(), digest_size=16).hexdigest()

    def shards(self, part: str) -> list[Shard]:
        """The shards of "train", of "validation" or of "all"."""
        return [shard for shard in self.index.shards if part in (shard.part, "all")]

    def total(self, part: str) -> Shard:
        """The counts of a part, added up."""
        shards = self.shards(part)
        sums = {n: sum(getattr(s, n) for s in shards) for n in ("tokens", "documents", "text_bytes")}
        return Shard(name="", part=part, checksum=0, **sums)

    def read(self, shard: Shard, start: int, stop: int) -> Array:
        """Tokens start..stop-1 of a shard, after their checksums were compared once.

        Raises:
            DamagedCorpusError: the blocks that hold them are not what was written.
        """
        if shard.name not in self._maps:
            self._maps[shard.name] = np.memmap(self._path(shard, "bin"), self.dtype, "r")
        tokens, table = self._maps[shard.name], self._tables[shard.name]
        size = tokens.itemsize
        for block in range(start * size // BLOCK, (stop * size - 1) // BLOCK + 1):
            if table.verified[block]:
                continue
            if (
                zlib.crc32(tokens[block * BLOCK // size : (block + 1) * BLOCK // size].data)
                != table.sums[block]
            ):
                raise DamagedCorpusError(
                    f"{self._path(shard, 'bin')} is damaged: bytes from {block * BLOCK} on do not have their"
                    " checksum; restore the file, or build the corpus again"
                )
            table.verified[block] = True
        return tokens[start:stop]

    def check(self) -> None:
        """Read every token and compare all checksums.

        Raises:
            DamagedCorpusError: as `read`.
        """
        step = BLOCK // self.dtype.itemsize * 256
        for shard in self.index.shards:
            for start in range(0, shard.tokens, step):
                self.read(shard, start, min(start + step, shard.tokens))

    def _path(self, shard: Shard, suffix: str) -> Path:
        return self.folder / f"{shard.name}.{suffix}"

    def _table(self, shard: Shard) -> _Table:
        table, path = self._path(shard, "crc"), self._path(shard, "bin")
        wanted = {
            path: shard.tokens * self.dtype.itemsize,
            table: 4 * _blocks(shard.tokens * self.dtype.itemsize),
        }
        for file, size in wanted.items():
            if not file.is_file():
                raise DamagedCorpusError(f"{file} is missing")
            if file.stat().st_size != size:
                raise DamagedCorpusError(f"{file} has {file.stat().st_size} bytes, {size} were written")
        data = table.read_bytes()
        if zlib.crc32(data) != shard.checksum:
            raise DamagedCorpusError(f"{table} is damaged: it does not have its checksum")
        sums = np.frombuffer(data, "<u4")
        return _Table(sums, np.zeros(len(sums), bool))


@dataclass(frozen=True)
class _Table:
    sums: NDArray[np.uint32]
    verified: NDArray[np.bool_]


def is_corpus(source: object) -> bool:
    """Whether a path is the folder of a finished corpus."""
    return isinstance(source, (str, Path)) and Path(source, INDEX_FILE).is_file()


def read_index(path: Path) -> Index:
    """The index of a corpus.

    Raises:
        DamagedCorpusError: it is not what `build_corpus` writes.
    """
    values = read_json(path)
    try:
        if values.get("format") != FORMAT:
            raise ValueError(f"format is {values.get('format')!r}, this version reads {FORMAT}")
        if type(values["vocab_size"]) is not int or not isinstance(values["tokenizer"], str):
            raise ValueError(f"vocab_size is {values['vocab_size']!r}, tokenizer {values['tokenizer']!r}")
        shards = tuple(_shard(one) for one in values.pop("shards"))
        return Index(shards=shards, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCorpusError(f"{path} is damaged: {error}") from error


def _shard(values: Any) -> Shard:
    counts = ("tokens", "documents", "text_bytes", "checksum")
    if not isinstance(values, dict) or set(values) != {f.name for f in fields(Shard)}:
        raise ValueError("a shard lacks fields, or has unknown ones")
    if values["part"] not in PARTS or not str(values["name"]).replace("-", "").isalnum():
        raise ValueError(f"shard {values['name']!r} of part {values['part']!r}")
    for name in counts:
        if type(values[name]) is not int or values[name] < 0:
            raise ValueError(f"shard {values['name']}: {name} is {values[name]!r}")
    return Shard(**values)


def shard_files(
    folder: Path, name: str, part: str, documents: Sequence[Array], text_bytes: int
) -> tuple[Shard, dict[Path, Content]]:
    """A shard of documents (tokens of each with its EOS), and the files to write for it."""
    data = np.concatenate(documents).tobytes()
    sums = np.array([zlib.crc32(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)], "<u4").tobytes()
    tokens = sum(map(len, documents))
    shard = Shard(name, part, tokens, len(documents), text_bytes, zlib.crc32(sums))
    return shard, {folder / f"{name}.bin": data, folder / f"{name}.crc": sums}


def _blocks(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK)
