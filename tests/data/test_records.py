"""Documents of one file: JSON in its forms, tables, compression, encodings, and the line of every error."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from loopmdm.data.text import read_documents

from .test_raw import COMPRESSORS

TEXTS = ["one\ntwo", "", 'é "日本"', "x" * 200_000]
KEPT = [text for text in TEXTS if text]
ROWS = [{"id": index, "text": text} for index, text in enumerate(TEXTS)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(path: Path, **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"], **options)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


JSON_FORMS = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines and empty lines": "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
    "array": json.dumps(ROWS),
    "indented array": json.dumps(ROWS, indent=2),
    "indented objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "columns": json.dumps({"id": [0, 1, 2, 3], "text": TEXTS}),
    "columns of pandas": json.dumps({"text": {str(index): text for index, text in enumerate(TEXTS)}}),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json(tmp_path: Path, form: str) -> None:
    assert list(read_documents(write(tmp_path / "a.json", JSON_FORMS[form]))) == KEPT
    if form.startswith("lines"):
        for suffix in ("jsonl", "ndjson", "jsonlines", "JSONL"):
            assert list(read_documents(write(tmp_path / f"a.{suffix}", JSON_FORMS[form]))) == KEPT


def test_json_of_one_document(tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path / "a.json", '{"text": "alone"}'))) == ["alone"]
    with pytest.raises(ValueError, match="no text in"):
        list(read_documents(write(tmp_path / "b.json", "")))
    with pytest.raises(ValueError, match="no text in"):
        list(read_documents(write(tmp_path / "b.json", "[]")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"},\n {"text": }]', "line 2: not JSON (Expecting value)"),
        ('[{"text": "a"},\n {"text": "b"}', "line 2: not JSON (the array has no end)"),
        ('[{"text": "a"}\n {"text": "b"}]', "line 2: not JSON (expected ',' or ']')"),
        ('[{"text": "a"}]\n\n[]', "line 3: not JSON (text after the array)"),
        ('{"text": "a"}\n{"text": 5}', "line 2: field 'text' is a int; accepted: a string"),
        ('{"text": "a"}\n{"body": "b"}', "line 2: no field 'text'; its fields: 'body'"),
        ('{"text": ["a", null]}', "line 1, row 1: field 'text' is a NoneType"),
        ("\n" + "[" * 100_000, "line 2: not JSON (nested too deeply)"),
        ('{"text": "a"}\n{"n": ' + "9" * 5000 + "}", "line 2: not JSON (Exceeds the limit"),
        ("just words", "line 1: not JSON (Expecting value)"),
        ('{"text": "a"}\n{"text": "\\ud83d"}', "line 2: field 'text' holds U+D83D, half of a surrogate pair"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(ValueError) as error:
        list(read_documents(path))
    assert str(error.value).startswith(f"{path}, {message}")


def test_half_surrogate_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "ok"}\n{"text": "a\\ud83d b\\udc00 \\ud83d\\ude00"}\n')
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: field 'text' holds U\+D83D, half of a surrogate"
    ):
        list(read_documents(path))
    assert list(read_documents(path, errors="replace")) == ["ok", "a\ufffd b\ufffd \U0001f600"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_with_a_header(tmp_path: Path, delimiter: str, suffix: str) -> None:
    assert list(read_documents(table(tmp_path / f"a.{suffix}", delimiter=delimiter))) == KEPT
    path = table(tmp_path / f"b.{suffix}", delimiter=delimiter, quoting=csv.QUOTE_ALL)
    assert list(read_documents(path, text_field="id")) == ["0", "1", "2", "3"]
    assert csv.field_size_limit() == 131072  # of the module, which others use


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("body,n\nx,1\n", "line 1: no column 'text'; its columns: 'body', 'n'; choose one with text_field"),
        ('text,n\n"a\nb",1\nc\n', "line 4: 1 fields, the header has 2"),
        ("\n\ntext,n\nx,1,2\n", "line 4: 3 fields, the header has 2"),
        ('text,n\nx,1\n"never closed,2\ny,3\n', "line 4: not a table (unexpected end of data)"),
        ('text,n\n"a"b,1\n', "line 2: not a table ("),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(ValueError) as error:
        list(read_documents(path))
    assert str(error.value).startswith(f"{path}, {message}")


def test_an_empty_table_holds_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "")
    write(tmp_path / "b.csv", "text\n")
    write(tmp_path / "c.csv", "text\n\nx\n\n")
    assert list(read_documents([tmp_path / f"{name}.csv" for name in "abc"])) == ["x"]


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_compressed_files_are_read_and_told(tmp_path: Path, kind: str, name: str) -> None:
    content = {"a.txt": "one\n", "a.csv": "text\none\n"}.get(name, '{"text": "one"}\n').encode()
    suffix = {"gzip": "gz", "bzip2": "bz2", "xz": "xz", "zstd": "zst"}[kind]
    path = write(tmp_path / f"{name}.{suffix}", COMPRESSORS[kind](content))
    expected = ["one\n"] if name == "a.txt" else ["one"]
    assert list(read_documents(path)) == expected
    with pytest.warns(UserWarning, match=rf"read: 1 compressed file\(s\) \({name}\.{suffix}\)"):
        assert list(read_documents(tmp_path)) == expected
    write(path, COMPRESSORS[kind](content * 5000)[:-9])
    with pytest.raises(ValueError, match=rf"{name}\.{suffix}: damaged {kind} data"):
        list(read_documents(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    for name, text in {
        "a.txt": "日本\n",
        "a.jsonl": '{"text": "日本\\n"}\n',
        "a.csv": 'text\n"日本\n"\n',
    }.items():
        assert list(read_documents(write(tmp_path / name, text.encode(encoding)))) == ["日本\n"]
    assert list(read_documents(tmp_path)) == ["日本\n"] * 3  # not taken for binary files
    broken = write(tmp_path / "b.jsonl", '{"text": "a"}\n{"text": "'.encode("utf-16") + b"\x00\xd8\n")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: byte 0x00 at offset .* is not UTF-16"):
        list(read_documents(broken))


def test_tables_of_pyarrow(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["a", "", "é"]
    strings = pa.array(texts)
    columns = [strings, strings.cast(pa.large_string()), strings.dictionary_encode()]
    if hasattr(pa, "string_view"):
        columns.append(strings.cast(pa.string_view()))
    columns.append(strings.cast(pa.binary()))  # as some programs write strings
    for index, column in enumerate(columns):
        for kind in ("arrow", "feather"):
            path = tmp_path / f"{index}.{kind}"
            schema = pa.schema([("text", column.type)])
            with (pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file)(str(path), schema) as writer:
                writer.write_table(pa.table([column], schema))
            assert list(read_documents(path)) == ["a", "é"]
    parquet.write_table(pa.table({"a.b": texts, "a": [{"b": "no"}] * 3}), tmp_path / "dotted.parquet")
    assert list(read_documents(tmp_path / "dotted.parquet", text_field="a.b")) == ["a", "é"]
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    parquet.write_table(pa.table({}), tmp_path / "nothing.parquet")
    parquet.write_table(pa.table({"text": texts}), tmp_path / "some.parquet", row_group_size=1)
    write(tmp_path / "z.parquet.gz", gzip.compress((tmp_path / "some.parquet").read_bytes()))
    files = [tmp_path / name for name in ("none.parquet", "nothing.parquet", "some.parquet", "z.parquet.gz")]
    assert list(read_documents(files)) == ["a", "é", "a", "é"]


def test_bad_rows_of_tables_are_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    for column, message in (
        (pa.array(["a", None]), "row 1: field 'text' is a NoneType; accepted: a string"),
        (pa.array([1]), "row 0: field 'text' is a int; accepted: a string"),
        (pa.array([["a"]]), "row 0: field 'text' is a list; accepted: a string"),
    ):
        parquet.write_table(pa.table({"text": column}), path)
        with pytest.raises(ValueError) as error:
            list(read_documents(path))
        assert str(error.value) == f"{path}, {message}"
    spoiled = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    parquet.write_table(pa.table({"text": spoiled}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: byte 0xe9 at offset 3 is not UTF-8"):
        list(read_documents(path))
    assert list(read_documents(path, errors="replace")) == ["fine", "caf\ufffd"]
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", whole[:60] + bytes(200) + whole[-100:]):
        with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet, row 0: ."):
            list(read_documents(write(path, damaged)))


def test_pointers_of_git_lfs(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for name in ("a.jsonl", "a.parquet", "a.txt", "a.csv", "a.json"):
        with pytest.raises(
            ValueError, match=f"{name} is a pointer of Git LFS, not the file itself: run git lfs"
        ):
            list(read_documents(write(tmp_path / name, pointer)))
