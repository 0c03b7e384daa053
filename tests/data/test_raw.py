"""Compressed files and byte order marks: the bytes inside, and damage that is named."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from pathlib import Path

import pytest

from loopmdm.data.raw import decode, open_raw, read_text

TEXT = "naïve 日本\r\nsecond line\n" * 5000


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


COMPRESSORS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd}


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed(tmp_path: Path, kind: str) -> None:
    """By content, whatever the name; several streams in one file are read to the end."""
    path = tmp_path / "data"
    compress = COMPRESSORS[kind]
    path.write_bytes(compress(TEXT.encode()) + compress(b"the end"))
    assert read_text(path) == TEXT + "the end"
    with open_raw(path) as file:
        assert file.readline() == "naïve 日本\r\n".encode()
    path.write_bytes(compress(b""))
    assert read_text(path) == ""


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_damaged(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    whole = COMPRESSORS[kind](TEXT.encode())
    for damaged in (whole[:-7], whole[:20] + bytes(40) + whole[60:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"data: damaged {kind} data \(."):
            read_text(path)


def test_zstd_without_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert read_text(path) == "text"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst \(zstd\) needs zstandard: pip install zstandard"):
        read_text(path)


def test_text_that_begins_like_compressed_data(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("BZh is how bzip2 begins")
    assert read_text(tmp_path / "a") == "BZh is how bzip2 begins"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_byte_order_marks(encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("be") else ""
    assert decode((mark + TEXT).encode(encoding), "f") == TEXT


@pytest.mark.parametrize(
    ("data", "message", "replaced"),
    [
        (b"ok\nna\xefve", "f, line 2: byte 0xef at offset 5 is not UTF-8;", "ok\nna\ufffdve"),
        (
            "ok\nx".encode("utf-16") + b"\xd8",
            "f, line 2: byte 0xd8 at offset 10 is not UTF-16",
            "ok\nx\ufffd",
        ),
    ],
)
def test_bytes_of_no_encoding(data: bytes, message: str, replaced: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data, "f")
    assert decode(data, "f", "replace") == replaced
