"""What a folder, a pattern or several paths mean: which files are read, and what is said of the others."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopmdm.data.text import read_documents
from tests.data.folders import read, saved, write

# Links, pipes and names of one file.


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "a.txt", "a")
    write(tmp_path / "other/b.txt", "b")
    (folder / "more").symlink_to(tmp_path / "other")
    (folder / "again.txt").symlink_to("a.txt")
    (folder / "sub").mkdir()
    (folder / "sub/up").symlink_to("..")
    (folder / "aa").symlink_to("sub")
    (folder / "gone.txt").symlink_to("nowhere")
    documents, said = read(folder)
    assert documents == ["a", "b"]
    assert said == [
        "left out: 2 link(s) to a folder that is read already (aa, sub/up)",
        "left out: 1 link(s) to nothing (gone.txt)",
        "left out: 1 more name(s) of files that are read (again.txt)",
    ]


def test_links_to_folders_above_are_not_followed(tmp_path: Path) -> None:
    """To / for instance, which would read the whole machine."""
    write(tmp_path / "project/data/a.txt", "a")
    write(tmp_path / "project/b.txt", "b")
    (tmp_path / "project/data/root").symlink_to("/")
    (tmp_path / "project/data/project").symlink_to("..")
    (tmp_path / "project/data/twin1").symlink_to(tmp_path / "other")
    (tmp_path / "project/data/twin2").symlink_to(tmp_path / "other")
    write(tmp_path / "other/c.txt", "c")
    documents, said = read(tmp_path / "project/data")
    assert documents == ["a", "c"]
    assert said == [
        "left out: 2 link(s) to a folder that this one is in (project, root)",
        "left out: 1 link(s) to a folder that is read already (twin2)",
    ]


def test_runs_inside_the_data_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    for name in ("run.json", "train_config.json", "metrics.jsonl", "loss.txt"):
        write(tmp_path / "run" / name, '{"step": 1}\n')
    assert read(tmp_path) == (["a"], ["left out: 1 folder(s) of runs and corpora (run)"])
    with pytest.raises(ValueError, match=r"run holds no files; left out: 1 folder\(s\) of runs and corpora"):
        read_documents(tmp_path / "run")
    assert read(tmp_path / "run/loss.txt")[0] == ['{"step": 1}\n']


def test_pipes_and_sockets_of_a_folder_are_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.jsonl")
    documents, said = read(tmp_path)
    assert documents == ["a"]
    assert said == ["left out: 2 FIFO(s), socket(s) or device(s) (pipe, pipe.jsonl)"]


def test_a_pipe_that_is_named_is_read() -> None:
    """As the shell gives one for <(command)."""
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    assert read(f"/dev/fd/{reader}") == (["text"], [])
    os.close(reader)


def test_sources_that_overlap_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.txt", "b")
    documents, said = read([tmp_path / "b.txt", tmp_path])
    assert documents == ["b", "a"] and said == ["left out: 1 more name(s) of files that are read (b.txt)"]


# Patterns and several paths.


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.md", "sub/c.txt", ".hidden.txt", "sub/d.bin"):
        write(tmp_path / name, "\0" if name.endswith("bin") else name)
    monkeypatch.chdir(tmp_path)
    assert read("*.txt") == (["a.txt"], [])
    assert read("**/*.txt") == (["a.txt", "sub/c.txt"], [])
    assert read("**") == (["a.txt", "b.md", "sub/c.txt"], ["left out: 1 binary file(s) (sub/d.bin)"])
    assert read(["b.md", tmp_path / "s*"])[0] == ["b.md", "sub/c.txt"]
    with pytest.raises(FileNotFoundError, match=r"source '\*\.rst': no file matches this pattern"):
        read_documents("*.rst")
    write(tmp_path / "[x].txt", "a name like a pattern")
    assert read("[x].txt") == (["a name like a pattern"], [])
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="'broken' is a link to a file that does not exist"):
        read_documents("broken")


# What turns out to hold no documents.


def test_files_without_documents_are_left_out_of_folders_and_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    others: dict[str, tuple[str | bytes, str]] = {
        "package.json": (
            '{"name": "x", "version": 1}',
            "package.json, line 1: no field 'text'; its fields: 'name'",
        ),
        "list.json": ("\n[1, 2]", "list.json, line 2: a int; accepted: objects with a text field"),
        "numbers.csv": ("x,y\n1,2\n", "numbers.csv, line 1: no column 'text'; its columns: 'x', 'y'"),
        "a.zip": (b"PK\x03\x04", "a.zip is an archive or compressed in a way that is not read: unpack"),
        "a.lz4": (b"\x04\x22\x4d\x18", "a.lz4 is an archive or compressed in a way that is not read"),
        "b.tar.gz": (gzip.compress(b"tar"), "b.tar.gz is an archive"),
        "c.bin": (b"ab\0", "c.bin is not a text file: NUL byte at offset 2"),
        "d.bin.gz": (gzip.compress(b"ab\0"), "d.bin.gz is not a text file: NUL byte at offset 2"),
        "e.png": (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "e.png is a pointer of Git LFS",
        ),
    }
    for name, (content, message) in others.items():
        write(tmp_path / name, content)
        with pytest.raises(ValueError) as error:
            read(tmp_path / name)
        assert message in str(error.value)
    documents, said = read(tmp_path)
    assert documents == ["a"]
    assert said == [
        "left out: 3 archive(s) or compressed file(s) of a kind that is not read (a.lz4, a.zip, b.tar.gz)",
        "left out: 2 binary file(s) (c.bin, d.bin.gz)",
        "left out: 1 pointer(s) of Git LFS, not fetched (e.png)",
        "left out: 1 JSON file(s) without records (list.json)",
        "left out: 1 table(s) without column 'text' (numbers.csv: its columns: 'x', 'y')",
        "left out: 1 JSON file(s) without field 'text' (package.json: its fields: 'name', 'version')",
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"no text in .*; left out: 3 archive\(s\).*its columns: 'x', 'y'"):
        read(tmp_path)


def test_suffixes_look_under_the_compression(tmp_path: Path) -> None:
    write(tmp_path / "a.txt.gz", gzip.compress(b"a"))
    write(tmp_path / "b.md", "b")
    assert read(tmp_path, suffixes=".txt")[0] == ["a"] == read(tmp_path, suffixes=".gz")[0]
    saved(tmp_path / "s", {"x.arrow": ["c"]})
    assert read(tmp_path, suffixes=".arrow")[0] == ["c"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "locked/b.txt", "b")
    listdir: Callable[[Any], list[str]] = os.listdir

    def refuse(path: Any) -> list[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        read_documents(tmp_path)
