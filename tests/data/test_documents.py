"""Reading documents, and splitting them."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from loopmdm.data.text import cut_document, read_documents, split_documents


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_file_is_one_document_kept_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "first\r\n\n日本\t\n")
    assert list(read_documents(path)) == ["first\r\n\n日本\t\n"]
    assert list(read_documents(str(path), errors="replace")) == ["first\r\n\n日本\t\n"]
    assert list(read_documents(write(tmp_path / "bom", b"\xef\xbb\xbfx"))) == ["x"]


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/b/c.md", ".hidden", ".git/x.txt", "__pycache__/y.txt", "empty.txt"):
        write(tmp_path / name, "" if name == "empty.txt" else name)
    assert list(read_documents(tmp_path)) == ["a/b/c.md", "a/z.py", "b.txt"]
    assert list(read_documents(tmp_path, suffixes=[".py", ".MD"])) == ["a/b/c.md", "a/z.py"]
    assert list(read_documents([tmp_path / "b.txt", tmp_path / "a"], suffixes=".py")) == ["b.txt", "a/z.py"]


def test_binary_files_are_skipped_in_a_folder_and_refused_by_name(tmp_path: Path) -> None:
    binary = write(tmp_path / "image.png", b"\x89PNG\0\0")
    write(tmp_path / "text.txt", "text")
    with pytest.warns(UserWarning, match="1 binary file"):
        assert list(read_documents(tmp_path)) == ["text"]
    with pytest.raises(ValueError, match=r"image\.png is not a text file: NUL byte at offset 4"):
        list(read_documents(binary))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt, line 1: byte 0xe9 at offset 3 is not UTF-8"):
        list(read_documents(path))
    assert list(read_documents(path, errors="replace")) == ["caf\ufffd au lait"]
    lines = write(tmp_path / "latin.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2: byte 0xe9 at offset 25"):
        list(read_documents(lines))
    assert list(read_documents(lines, errors="replace")) == ["ok", "\ufffd"]


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "id": 1}, {"text": "", "id": 2}, {"text": "é", "id": 3}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert list(read_documents(path)) == ["one\ntwo", "é"]
    other = write(tmp_path / "b.jsonl", '{"body": "x"}\n')
    assert list(read_documents(other, text_field="body")) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "line 2: not JSON"),
        ('["x"]', "line 2: a list; accepted: an object"),
        ('{"body": "x"}', "line 2: no field 'text'; its fields: 'body'; choose one with text_field"),
        ('{"text": 5}', "line 2: field 'text' is a int; accepted: a string"),
        ('{"text": null}', "line 2: field 'text' is a NoneType"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n{line}\n')
    documents = read_documents(path)
    assert next(documents) == "fine"
    with pytest.raises(ValueError, match=r"a\.jsonl, " + message):
        next(documents)


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow"])
def test_tables(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", "", "three"], "body": ["1", "2", "3"]})
    path = tmp_path / f"odd [name]*.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if kind == "stream.arrow" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    assert list(read_documents(tmp_path)) == ["one", "three"]
    assert list(read_documents(path, text_field="body")) == ["1", "2", "3"]
    with pytest.raises(ValueError, match="row 0: no field 'words'; its fields: 'text', 'body'"):
        list(read_documents(path, text_field="words"))
    broken = write(tmp_path / f"broken.{kind}", b"not a table")
    with pytest.raises(ValueError, match=rf"broken\.{kind} cannot be read as {path.suffix[1:]}"):
        list(read_documents(broken))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / name, b"PAR1")
    with pytest.raises(ImportError, match=rf"{name} needs the package pyarrow.*loopmdm-kernels\[train\]"):
        list(read_documents(path))


def test_stdlib_is_python_source_without_tests() -> None:
    documents = list(read_documents("stdlib"))
    assert len(documents) > 400
    assert sum(map(len, documents)) > 5_000_000
    assert any("class ArgumentParser" in d for d in documents)
    assert not any("class ArgparseTests" in d or "import pytest\n" in d for d in documents)
    ast.parse(documents[0])
    assert documents == list(read_documents(["stdlib"]))


def test_a_file_of_the_stdlib_under_two_names_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "a.py").symlink_to("b.py")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert list(read_documents("stdlib")) == ["x = 1\n"]


def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match="source 'nowhere' does not exist; accepted: a file, a folder"
    ):
        read_documents("nowhere")
    with pytest.raises(FileNotFoundError, match="gone"):
        read_documents([tmp_path, tmp_path / "gone"] if write(tmp_path / "a", "a") else [])
    with pytest.raises(ValueError, match=r"no files ending in \.txt"):
        read_documents(tmp_path, suffixes=".txt")
    with pytest.raises(ValueError, match="suffixes holds 'txt'"):
        read_documents(tmp_path, suffixes="txt")
    with pytest.raises(ValueError, match="source is empty"):
        read_documents([])
    with pytest.raises(ValueError, match="errors is 'ignore'"):
        read_documents(tmp_path, errors="ignore")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void holds no files"):
        read_documents(tmp_path / "void")
    with pytest.raises(ValueError, match=r"no text in .*empty"):
        list(read_documents(write(tmp_path / "empty", "")))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "stdlib/mine.txt", "mine")
    assert list(read_documents("./stdlib")) == ["mine"]


DOCUMENTS = [f"document {i}" for i in range(2000)]


def test_split_partitions_and_keeps_the_order() -> None:
    train, held_out = split_documents(DOCUMENTS, validation=0.05)
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert train == [d for d in DOCUMENTS if d in set(train)]
    assert 60 <= len(held_out) <= 140  # 100 expected, standard deviation 9.7


def test_split_depends_on_content_and_seed_only() -> None:
    _, held_out = split_documents(DOCUMENTS, seed=3)
    _, reversed_held_out = split_documents(reversed(DOCUMENTS), seed=3)
    assert held_out == reversed_held_out[::-1]
    _, of_half = split_documents(DOCUMENTS[:1000], seed=3)
    assert of_half == [d for d in held_out if d in set(DOCUMENTS[:1000])]
    assert held_out != split_documents(DOCUMENTS, seed=4)[1]


def test_equal_documents_stay_together() -> None:
    train, held_out = split_documents(DOCUMENTS[:300] * 3, validation=0.3)
    assert held_out and not set(train) & set(held_out)


@pytest.mark.parametrize("validation", [1e-9, 0.999999])
def test_no_side_is_empty(validation: float) -> None:
    train, held_out = split_documents(DOCUMENTS[:25], validation=validation)
    assert {len(train), len(held_out)} == {1, 24}


def test_one_long_file_is_cut_at_line_ends() -> None:
    text = "".join(f"line {i}\n" for i in range(20_000))
    train, held_out = split_documents([text])
    pieces = train + held_out
    assert 150 < len(pieces) <= 210 and held_out
    assert all(piece.endswith("\n") and piece.startswith("line") for piece in pieces)
    assert sum(map(len, pieces)) == len(text)


@pytest.mark.parametrize("text", ["", "ab", "abcdefghij\nklm\n\nnop", "\n" * 30, "x" * 100])
@pytest.mark.parametrize("max_chars", [1, 4, 1000])
def test_pieces_join_to_the_document(text: str, max_chars: int) -> None:
    pieces = list(cut_document(text, max_chars))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces)


@pytest.mark.parametrize(
    ("documents", "arguments", "message"),
    [
        ([], {}, "documents is empty"),
        (["only one"], {}, r"1 document\(s\) with one content"),
        (["same"] * 30, {}, r"30 document\(s\) with one content"),
        (DOCUMENTS, {"validation": 1.0}, r"validation is 1\.0"),
        (DOCUMENTS, {"validation": -0.1}, r"validation is -0\.1"),
        (DOCUMENTS, {"seed": -1}, "seed is -1"),
    ],
)
def test_bad_split(documents: Iterable[str], arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_documents(documents, **arguments)
    assert split_documents(["only one"], validation=0) == (["only one"], [])
