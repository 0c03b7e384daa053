"""Files with random damage: what is read is text, and every refusal is an error that names the file."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopmdm.data.sudoku import NINE, encode_boards, format_board, generate, read_puzzles
from loopmdm.data.text import read_documents

TEXTS = ["one\ntwo", "é", "x" * 50]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS)
WEDGES = [
    b"\0", b"\xff", b"\xd8\x00", b"[", b"]", b"{", b"}", b'"', b",", b"\n", b"\r", b"\\ud800", b"null", b"-",
    b"+-+", b"|", b"#", b";", b"\t", b"x" * 20, b"\xef\xbb\xbf", b"\xff\xfe", b"9" * 30,
]  # fmt: skip
ROUNDS = 60


def damaged(data: bytes, source: random.Random) -> bytes:
    """`data` with bytes changed, put in, taken out, doubled or cut off at the end."""
    out = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 4, 16))):
        at = source.randrange(len(out) + 1)
        kind = source.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            out[at:at] = source.choice(WEDGES)
        elif kind == 2:
            del out[at : at + source.choice((1, 2, 8, 64, 500))]
        elif kind == 3:
            start = source.randrange(len(out) + 1)
            out[at:at] = out[start : start + source.choice((1, 9, 81, 300))]
        else:
            del out[at:]
    return bytes(out)


def hold(path: Path, data: bytes, read: Callable[[Path], Any], label: str) -> None:
    """Read the damaged versions of a file."""
    source = random.Random(label)
    for _ in range(ROUNDS):
        path.write_bytes(damaged(data, source))
        try:
            read(path)
        except (ValueError, OSError) as error:
            assert str(path.parent) in str(error)


def documents(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for document in read_documents(path, errors="replace"):
            document.encode()  # without half surrogate pairs


def table(delimiter: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([["n", "text"], *([1, text] for text in TEXTS)])
    return text.getvalue()


TEXT_FILES = {
    "a.jsonl": LINES.encode(),
    "b.jsonl": LINES.encode("utf-16"),
    "a.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "b.json": json.dumps({"text": TEXTS}).encode(),
    "a.csv": table(",").encode(),
    "b.tsv": table("\t").encode("utf-16"),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_text(tmp_path: Path, name: str) -> None:
    hold(tmp_path / name, TEXT_FILES[name], documents, name)


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow"])
def test_tables_of_pyarrow(tmp_path: Path, kind: str) -> None:
    hold(tmp_path / f"a.{kind}", arrow(tmp_path, kind, TEXTS), documents, kind)


def arrow(folder: Path, kind: str, texts: list[str]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, rows = folder / "whole", pa.table({"text": texts, "n": list(range(len(texts)))})
    if kind == "parquet":
        parquet.write_table(rows, path)
    else:
        with (pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file)(
            str(path), rows.schema
        ) as file:
            file.write_table(rows)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["stream.arrow", "file.arrow"])
def test_offsets_that_lead_out_of_the_file(tmp_path: Path, kind: str) -> None:
    data = arrow(tmp_path, kind, ["abc", "", "defgh"])
    offsets = struct.pack("<4i", 0, 3, 3, 8)
    assert data.count(offsets) == 1
    for wrong in ((0, 3, 1 << 30, 8), (0, 3, -5, 8), (0, 3, 3, 1 << 30)):
        (tmp_path / "a.arrow").write_bytes(data.replace(offsets, struct.pack("<4i", *wrong)))
        with pytest.raises(ValueError, match=r"a\.arrow cannot be read as arrow, row 0: "):
            list(read_documents(tmp_path / "a.arrow"))


@pytest.mark.parametrize("form", ["lines", "columns", "drawn", "rows", "utf-16"])
def test_puzzles(tmp_path: Path, form: str) -> None:
    made = generate(NINE, 2, seed=1, clues=None)
    boards, answers = encode_boards(NINE, made.clues), encode_boards(NINE, made.solutions)
    columns = "id,question,answer\n" + "\n".join(f"1,{b},{a}" for b, a in zip(boards, answers, strict=True))
    text = {
        "lines": "\n".join(boards),
        "drawn": "\n".join(format_board(NINE, board) for board in made.clues),
        "rows": "\n".join(board[i : i + 9] for board in boards for i in range(0, 81, 9)),
    }.get(form, columns)
    hold(tmp_path / "p.csv", text.encode("utf-16" if form == "utf-16" else "utf-8"), read_puzzles, form)
