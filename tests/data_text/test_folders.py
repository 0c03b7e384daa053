"""What a folder, a pattern or several paths mean: which files are read, and what is said of the others."""

from __future__ import annotations

import gzip
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopmdm.data.text import documents_in, found_files, read_documents


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def read(source: Any, **options: Any) -> tuple[list[str], list[str]]:
    """The documents, and the warnings after them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        documents = list(read_documents(source, **options))
    return documents, [str(warning.message) for warning in said if warning.category is UserWarning]


def arrow(path: Path, texts: list[str], column: str = "text", values: Any = None) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({column: texts if values is None else values})
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def saved(folder: Path, shards: dict[str, list[str]], **state: Any) -> Path:
    """A folder as Dataset.save_to_disk writes it."""
    for name, texts in shards.items():
        arrow(folder / name, texts)
    files = [{"filename": name} for name in shards]
    write(folder / "state.json", json.dumps({"_data_files": files, "_split": None, **state}))
    write(folder / "dataset_info.json", "{}")
    return folder


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
    assert read(tmp_path) == (["a"], ["left out: 1 folder(s) of runs (run)"])
    with pytest.raises(ValueError, match=r"run holds no files; left out: 1 folder\(s\) of runs"):
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


# Folders that the package datasets wrote.


def test_saved_data_set_is_the_files_that_its_state_names(tmp_path: Path) -> None:
    folder = saved(tmp_path / "d", {"data-0.arrow": ["a", "b"], "data-1.arrow": ["c"]})
    arrow(folder / "cache-1.arrow", ["A", "B", "C"])
    arrow(folder / "cache-2.arrow", [], "indices", [2, 0])
    write(folder / "tmp123", "left by a killed process")
    assert read(folder) == (["a", "b", "c"], [])
    assert read(f"{folder}/*.arrow") == (["a", "b", "c"], [])
    assert read(sorted(folder.iterdir())) == (["a", "b", "c"], [])
    assert read(folder / "cache-1.arrow")[0] == ["A", "B", "C"]  # asked for alone
    found = found_files(tmp_path)
    assert list(documents_in(found)) == ["a", "b", "c"]
    assert found.read() == f"1 file(s) of {tmp_path}: 1 saved data set"
    assert found.remarks() == [
        "left out: 3 working file(s) of datasets (d/cache-1.arrow, d/cache-2.arrow, d/tmp123)"
    ]


def test_state_without_its_companion(tmp_path: Path) -> None:
    """state.json alone describes the folder too, if it is that of a data set; else it is a file of JSON."""
    folder = saved(tmp_path / "d", {"data.arrow": ["a"]})
    arrow(folder / "cache-1.arrow", ["A"])
    (folder / "dataset_info.json").unlink()
    assert read(folder) == (["a"], [])
    for text in ('{"text": "of a game"}', "[]"):
        write(tmp_path / "e/state.json", text)
        write(tmp_path / "e/b.txt", "b")
        assert read(tmp_path / "e")[0][0] == "b"


def test_indices_of_datasets_1_are_followed(tmp_path: Path) -> None:
    for key in ("_indices_files", "_indices_data_files"):
        folder = saved(tmp_path / key, {"data.arrow": ["a", "b", "c"]}, **{key: [{"filename": "i.arrow"}]})
        arrow(folder / "i.arrow", [], "indices", [2, 0, 2])
        assert read(folder) == (["c", "a", "c"], [])
        arrow(folder / "i.arrow", [], "indices", [3])
        with pytest.raises(ValueError, match=r"i\.arrow: index 3, but the data set has 3 rows"):
            read(folder)


def test_a_saved_data_set_without_rows_is_an_empty_shard(tmp_path: Path) -> None:
    saved(tmp_path / "a", {})
    write(tmp_path / "a/state.json", '{"_data_files": []}')
    saved(tmp_path / "b", {"data.arrow": ["b"]})
    assert read(tmp_path)[0] == ["b"]
    with pytest.raises(ValueError, match="no text in"):
        read(tmp_path / "a")


@pytest.mark.parametrize("change", ["map", "filter", "shuffle", "select"])
def test_saved_by_datasets_itself(tmp_path: Path, change: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    texts = [f"doc {i}" for i in range(9)]
    datasets.Dataset.from_dict({"text": texts, "n": list(range(9))}).save_to_disk(
        tmp_path / "a", num_shards=3
    )
    loaded = datasets.load_from_disk(tmp_path / "a")
    changed = {
        "map": lambda: loaded.map(lambda row: {"text": row["text"].upper()}),
        "filter": lambda: loaded.filter(lambda row: row["n"] > 4),
        "shuffle": lambda: loaded.shuffle(seed=1),
        "select": lambda: loaded.shuffle(seed=1).select(range(2, 5)),
    }[change]()
    assert read(tmp_path / "a")[0] == texts
    changed.save_to_disk(tmp_path / "b")
    assert read(tmp_path / "b")[0] == changed["text"][:]


def test_dataset_dict_is_its_train_split(tmp_path: Path) -> None:
    for split in ("test", "train", "validation"):
        saved(tmp_path / "d" / split, {"data.arrow": [split]})
    write(tmp_path / "d/dataset_dict.json", '{"splits": ["train", "test", "validation"]}')
    documents, said = read(tmp_path)
    assert documents == ["train"]
    assert said == [
        "left out: 1 file(s) of split test, as train is there (d/test)",
        "left out: 1 file(s) of split validation, as train is there (d/validation)",
    ]
    assert read(tmp_path / "d/test")[0] == ["test"]
    write(tmp_path / "d/dataset_dict.json", '{"splits": ["test"]}')
    assert read(tmp_path)[0] == ["test"]
    write(tmp_path / "d/dataset_dict.json", '{"splits": ["test", "train_sft"]}')
    with pytest.raises(FileNotFoundError, match="names the split 'train_sft', but there is no folder"):
        read(tmp_path)
    write(tmp_path / "d/dataset_dict.json", '{"splits": ["test", "validation"]}')
    with pytest.raises(ValueError, match="holds the splits test, validation and not one called train"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("state.json", "{", r"state\.json is damaged: Expecting"),
        ("state.json", "[]", r"state\.json is damaged: a list instead of an object"),
        ("state.json", "[" * 100_000, r"state\.json is damaged"),
        ("state.json", "{}", r"state\.json: no file is named in _data_files"),
        ("state.json", '{"_data_files": ["a"]}', r"state\.json: _data_files is not a list of file names"),
        (
            "state.json",
            '{"_data_files": [{"filename": "x"}]}',
            r"state\.json names 'x', but there is no file",
        ),
        ("state.json", '{"_data_files": [{"filename": "../x"}]}', r"'\.\./x' is no name of a file in this"),
        ("dataset_dict.json", "{}", r"dataset_dict\.json: no list of splits"),
        ("dataset_dict.json", '{"splits": ["/etc"]}', r"'/etc' is no name of a file in this folder"),
    ],
)
def test_damaged_descriptions_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    saved(tmp_path, {"data.arrow": ["a"]})
    write(tmp_path / name, text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(tmp_path)


def test_cache_of_datasets(tmp_path: Path) -> None:
    """BUILDER-SPLIT.arrow beside dataset_info.json; results of map and unfinished builds are no data."""
    leaf = tmp_path / "json/default-0/0.0.0/abc"
    arrow(leaf / "json-train-00000-of-00002.arrow", ["a"])
    arrow(leaf / "json-train-00001-of-00002.arrow", ["b"])
    arrow(leaf / "json-test.arrow", ["held out"])
    arrow(leaf / "cache-77.arrow", ["A"])
    arrow(leaf.parent / "def.incomplete/json-train.arrow", ["half"])
    write(leaf.parent / "abc_builder.lock", "")
    write(tmp_path / "uv.lock", "a lock file of another kind")
    info = {"splits": {"train": {"num_examples": 2}, "test": {"num_examples": 1}}}
    write(leaf / "dataset_info.json", json.dumps(info))
    documents, said = read(tmp_path)
    assert documents == ["a", "b", "a lock file of another kind"]
    assert [f.path.name for f in found_files(tmp_path).files] == [
        "json-train-00000-of-00002.arrow",
        "json-train-00001-of-00002.arrow",
        "uv.lock",
    ]
    assert said == [
        "left out: 1 file(s) of split test, as train is there (json/default-0/0.0.0/abc/json-test.arrow)",
        "left out: 1 unfinished download(s) (json/default-0/0.0.0/def.incomplete)",
    ]


CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n---\n# A data set\n"


def hub(folder: Path, revision: str, files: dict[str, str]) -> Path:
    """A repository as huggingface_hub caches it: blobs, and snapshots of links to them."""
    for index, (name, text) in enumerate(files.items()):
        write(folder / f"blobs/{revision}{index}", text)
        link = folder / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder / f"blobs/{revision}{index}", link.parent))
    return folder / "snapshots" / revision


def test_cache_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "datasets--me--mine"
    old = hub(folder, "aaa", {"README.md": CARD, "data/train-00000-of-00001.jsonl": lines("old")})
    files = {
        "README.md": CARD,
        "data/train-00000-of-00002.jsonl": lines("a"),
        "data/train-00001-of-00002.jsonl": lines("b"),
        "data/test-00000-of-00001.jsonl": lines("held out"),
    }
    new = hub(folder, "bbb", files)
    write(folder / "refs/main", "bbb")
    documents, said = read(tmp_path)
    assert documents == ["a", "b"] and read(new)[0] == ["a", "b"] and read(old)[0] == ["old"]
    assert sorted(said) == [
        "left out: 1 dataset card(s) (datasets--me--mine/snapshots/bbb/README.md)",
        "left out: 1 file(s) of split test, as train is there"
        " (datasets--me--mine/snapshots/bbb/data/test-00000-of-00001.jsonl)",
        "left out: 1 snapshot(s) of another revision (datasets--me--mine/snapshots/aaa)",
    ]
    (folder / "refs/main").unlink()
    with pytest.raises(ValueError, match="snapshots holds aaa, bbb, and refs/main names none of these"):
        read(tmp_path)


CONFIGS = {
    "paths": """configs:
- config_name: default
  data_files:
  - split: train
    path: data/part-*
  - split: test
    path: "data/held.jsonl"
""",
    "lists": """license: mit
configs:
  - config_name: en
    data_files:
      - split: test
        path:
          - data/held.jsonl
      - split: train
        path:
        - "data/part-0.jsonl"
        - 'data/part-1.jsonl'
  - config_name: other
    data_files: nothere/*
size_categories:
- n<1K
""",
    "without splits": """configs:
- config_name: default
  data_files:
  - "**/part-?.jsonl"
""",
}


@pytest.mark.parametrize("form", CONFIGS)
def test_a_card_that_names_the_files_of_its_splits(tmp_path: Path, form: str) -> None:
    write(tmp_path / "README.md", f"---\n{CONFIGS[form]}---\n# A data set\n")
    for name in ("data/part-0", "data/part-1", "data/held", "extra"):
        write(tmp_path / f"{name}.jsonl", lines(name))
    write(tmp_path / "data/README.rst", "about the parts")
    documents, said = read(tmp_path)
    assert documents == ["data/part-0", "data/part-1"]
    told = {
        "left out: 1 text file(s) about the data beside them (data/README.rst)",
        "left out: 1 dataset card(s) (README.md)",
        "left out: 1 file(s) of split test, as train is there (data/held.jsonl)",
        "left out: 1 file(s) that the dataset card does not name (extra.jsonl)",
    }
    if form == "without splits":
        told = {line for line in told if "split test" not in line and "not name" not in line}
        both = "data/held.jsonl, extra.jsonl"
        told.add(f"left out: 2 file(s) that the dataset card does not name ({both})")
    assert set(said) == told


def test_a_snapshot_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"README.md": "no card", "LICENSE": "free", "wiki.train.txt": "a", "wiki.test.txt": "b"}
    folder = hub(tmp_path / "datasets--me--wiki", "abc", files)
    assert read(tmp_path)[0] == ["a"]
    monkeypatch.chdir(folder)
    assert read(".")[0] == ["a"]


def test_cards_and_texts_about_data_are_no_data(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", "licence.txt", "CITATION.cff", "data/README.rst"):
        write(tmp_path / name, "about")
    write(tmp_path / "data/a.jsonl", lines("a"))
    write(tmp_path / "data/readmes.txt", "b")
    write(tmp_path / "notes/README.md", "c")
    documents, said = read(tmp_path)
    assert documents == ["a", "b", "c"]
    assert said == [
        "left out: 5 text file(s) about the data beside them (CITATION.cff, LICENSE, README.md, and 2 more)"
    ]


def test_in_a_folder_of_text_a_readme_is_text(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "# Read me\n")
    write(tmp_path / "src/README.md", "---\ntitle: a page of a blog\n---\nRead me too\n")
    write(tmp_path / "src/a.py", "a")
    assert read(tmp_path) == (["# Read me\n", "---\ntitle: a page of a blog\n---\nRead me too\n", "a"], [])
    write(tmp_path / "README.md", CARD)
    assert read(tmp_path)[0][0].startswith("---\ntitle")


SPLIT_FOLDERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "shards of the hub": (
        {"data/train-0-of-1.jsonl": "a", "data/test-0-of-1.jsonl": "b", "data/validation-0-of-1.jsonl": "c"},
        ["a"],
    ),
    "files": ({"train.jsonl": "a", "dev.jsonl": "b"}, ["a"]),
    "folders": ({"training/x.jsonl": "a", "eval/x.jsonl": "b"}, ["a"]),
    "hive": ({"split=train/x.jsonl": "a", "split=test/x.jsonl": "b"}, ["a"]),
    "with others": ({"train.jsonl": "a", "test.jsonl": "b", "extra.jsonl": "c"}, ["c", "a"]),
    "text": ({"wiki.train.raw": "a", "wiki.valid.raw": "b", "wiki.test.raw": "c", "README": "d"}, ["d", "a"]),
    "text with a license": ({"train.txt": "a", "test.txt": "b", "LICENSE.txt": "c"}, ["c", "a"]),
    "one split": ({"test.jsonl": "a"}, ["a"]),
    "articles": ({"trains/train.txt": "a", "crash-test.txt": "b", "c.txt": "c"}, ["c", "b", "a"]),
    "sources": ({"train.py": "a", "test.py": "b", "tests/test_a.py": "c"}, ["b", "c", "a"]),
}


@pytest.mark.parametrize("case", SPLIT_FOLDERS)
def test_files_named_by_split(tmp_path: Path, case: str) -> None:
    files, expected = SPLIT_FOLDERS[case]
    for name, text in files.items():
        write(tmp_path / name, lines(text) if name.endswith(".jsonl") else text)
    documents, said = read(tmp_path)
    assert documents == expected
    assert len(said) == len({text for text in files.values()} - set(expected))
    assert all("as train is there" in line for line in said)


def test_splits_without_train_are_a_question(tmp_path: Path) -> None:
    for name in ("test.jsonl", "validation.jsonl"):
        write(tmp_path / name, lines(name))
    with pytest.raises(ValueError, match="holds the splits test, validation and no train; give the files of"):
        read_documents(tmp_path)
    write(tmp_path / "more.jsonl", lines("more"))
    assert len(read(tmp_path)[0]) == 3


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
