"""Bytes and text of files as they come: compressed or not, with a byte order mark or without."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

from loopmdm.printable import printable

Errors: TypeAlias = Literal["strict", "replace"]
_NAMES_SHOWN, _NAME_SHOWN = 20, 40

# Formats by their first bytes: a name may say less than the file, or something else.
_COMPRESSED = (
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2"),
    (re.compile(rb"\xfd7zXZ\x00"), "xz"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd"),
)
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_POINTER = b"version https://git-lfs.github.com/spec/"
_CHUNK = 1 << 16
_PROBE = len(_POINTER)


class PointerError(ValueError):
    """A file that stands for another one, which Git LFS has not fetched."""


def open_raw(path: Path) -> BinaryIO:
    """The bytes of a file, of a compressed one (gzip, bzip2, xz, zstd) those inside.

    Raises:
        ImportError: zstd data, and neither zstandard nor pyarrow is installed.
        ValueError: a pointer of Git LFS; while reading: the compressed data are damaged or cut short.
    """
    file = open(path, "rb")  # noqa: SIM115
    try:
        start = file.peek(_PROBE)
        if start.startswith(_POINTER):
            raise PointerError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull")
        for magic, name in _COMPRESSED:
            if magic.match(start):
                inner = _DECODERS[name](file)
                return cast(BinaryIO, io.BufferedReader(_Checked(inner, file, path, name), _CHUNK))
    except BaseException:
        file.close()
        raise
    return file


def is_plain(file: BinaryIO) -> bool:
    """Whether a file of `open_raw` is a regular one whose bytes are those on disk."""
    raw = getattr(file, "raw", None)
    return not isinstance(raw, _Checked) and stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def read_text(path: Path, errors: Errors = "strict") -> str:
    """A file as text; see `open_raw` and `decode`."""
    with open_raw(path) as file:
        return decode(file.read(), path, errors)


def decode(data: bytes, name: object, errors: Errors = "strict") -> str:
    """`data` as text: UTF-8, or what a byte order mark says (UTF-16, UTF-32); the mark is dropped.

    Raises:
        ValueError: bytes that are not of this encoding, and errors is "strict"; it has the line and `name`.
    """
    encoding = encoding_of(data)
    try:
        return data.decode(encoding, errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise ValueError(bad_bytes(f"{name}, line {line}", error, encoding)) from None


def bad_bytes(where: str, error: UnicodeDecodeError, encoding: str = "utf-8", offset: int = 0) -> str:
    """What a message says about bytes that do not decode; offset: of the bytes in the file."""
    return (
        f"{where}: byte {error.object[error.start]:#04x} at offset {offset + error.start} is not"
        f" {encoding.upper()}; convert the file, or read it with errors='replace'"
    )


def encoding_of(start: bytes) -> str:
    """The encoding that the byte order mark at the start names; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


class _Checked(io.RawIOBase):
    """Decompressed bytes; damage is one kind of error, with the name of the file."""

    def __init__(self, inner: BinaryIO, file: BinaryIO, path: Path, kind: str) -> None:
        self._inner, self._file, self._path, self._kind = inner, file, path, kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._inner.read(len(buffer))
        except Exception as error:  # each decompressor has exceptions of its own
            raise ValueError(f"{self._path}: damaged {self._kind} data ({printable(error)})") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._inner.close()
        self._file.close()
        super().close()


def _open_zstd(file: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        return _open_zstd_with_pyarrow(file)
    return cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))


def _open_zstd_with_pyarrow(file: BinaryIO) -> BinaryIO:
    try:
        import pyarrow
    except ImportError:
        name = os.fspath(file.name)
        raise ImportError(f"reading {name} (zstd) needs zstandard: pip install zstandard") from None
    return cast(BinaryIO, pyarrow.CompressedInputStream(file, "zstd"))


_DECODERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "gzip": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    "bzip2": lambda file: cast(BinaryIO, bz2.BZ2File(file)),
    "xz": lambda file: cast(BinaryIO, lzma.LZMAFile(file)),  # noqa: SIM115
    "zstd": _open_zstd,
}


CHOOSE = "choose one with text_field"


def no_field(text_field: str, names: Any, what: str) -> str:
    """What a message says about a record without the field of the text."""
    return f"no {what} {text_field!r}; {known(names, what)}; {CHOOSE}"


def known(names: Any, what: str) -> str:
    """The fields or columns that there are, the first of many."""
    shown = [name if len(name) < _NAME_SHOWN else f"{name[:_NAME_SHOWN]}..." for name in map(str, names)]
    return f"its {what}s: {', '.join(map(repr, shown[:_NAMES_SHOWN])) or 'none'}"
