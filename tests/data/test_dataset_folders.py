"""Folders that datasets and the hub wrote: the files that their descriptions name, and the train split."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from loopmdm.data.text import documents_in, found_files, read_documents
from tests.data.folders import arrow, lines, read, saved, write


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
