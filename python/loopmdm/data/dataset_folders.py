"""Folders that the packages datasets and huggingface_hub write, read as their own files describe them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loopmdm.printable import printable
from loopmdm_kernels.values import parse_json

DICT_FILE = "dataset_dict.json"  # DatasetDict.save_to_disk: the names of the splits, each a folder
STATE_FILE = "state.json"  # Dataset.save_to_disk: the names of the files that hold the rows
INFO_FILE = "dataset_info.json"  # beside STATE_FILE, or alone in the cache of datasets
_ROWS = ("_data_files",)
WORKING = "working file(s) of datasets"
_SPLIT = "file(s) of split {}, as {} is there"


class Written(NamedTuple):
    """What to read of a folder: entries in it, and the folder itself if it is one saved data set."""

    names: list[str]
    saved: bool
    left_out: dict[str, str]  # name -> why


def read(folder: Path, names: Sequence[str]) -> Written | None:
    """What the description in a folder says about the entries `names`; None where there is no description.

    Raises:
        ValueError: a damaged description, or splits without one to train on.
        FileNotFoundError: a split or a snapshot that the description names is not there.
    """
    if DICT_FILE in names:
        return _dataset_dict(folder)
    if STATE_FILE in names and (INFO_FILE in names or _names_files(folder / STATE_FILE)):
        kept = set(saved_files(folder)) | set(index_files(folder)) | {STATE_FILE, INFO_FILE}
        return Written([], True, {name: WORKING for name in names if name not in kept})
    if INFO_FILE in names:
        return _cache(folder, names)
    if "snapshots" in names and {"refs", "blobs"} & set(names):
        return _hub(folder)
    return None


def saved_files(folder: Path) -> list[str]:
    """The files that hold the rows of a saved data set, in order."""
    return _file_names(folder, _ROWS)


def index_files(folder: Path) -> list[str]:
    """The files that say which rows, in which order; datasets 1.x kept them, 2.x writes the rows out."""
    return _file_names(folder, ("_indices_data_files", "_indices_files"))


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a revision of a repository in the cache of the hub."""
    folder = folder.absolute()
    cache = folder.parent.parent
    return folder.parent.name == "snapshots" and ((cache / "refs").is_dir() or (cache / "blobs").is_dir())


def is_lock(path: Path) -> bool:
    """Whether a file is what datasets and the hub lock while they write: NAME.lock without content."""
    return path.suffix == ".lock" and path.is_file() and path.stat().st_size == 0


def choose_split(splits: Sequence[str], where: object) -> str:
    """train, or the only split there is."""
    train = [split for split in splits if split == "train"] or [s for s in splits if s.startswith("train")]
    if len(train) == 1 or len(splits) == 1:
        return (train or list(splits))[0]
    raise ValueError(
        f"{where} holds the splits {', '.join(sorted(splits)) or '(none)'} and not one called train;"
        " give the folder or the files of one"
    )


def _dataset_dict(folder: Path) -> Written:
    path = folder / DICT_FILE
    splits = _object(path).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(s, str) for s in splits):
        raise ValueError(f"{path}: no list of splits; write the data set again with save_to_disk")
    for split in splits:
        _inside(path, split)
    taken = choose_split(splits, folder)
    if not (folder / taken).is_dir():
        raise FileNotFoundError(f"{path} names the split {taken!r}, but there is no folder {folder / taken}")
    return Written([taken], False, {split: _SPLIT.format(split, taken) for split in splits if split != taken})


def _cache(folder: Path, names: Sequence[str]) -> Written | None:
    """BUILDER-SPLIT.arrow, in shards BUILDER-SPLIT-00000-of-00002.arrow; results of map beside them."""
    splits = _object(folder / INFO_FILE).get("splits")
    if not isinstance(splits, dict):
        return None
    files: dict[str, list[str]] = {}
    for name in names:
        for split in splits:
            if re.fullmatch(rf".+-{re.escape(split)}(-\d+-of-\d+)?\.(arrow|parquet)", name):
                files.setdefault(split, []).append(name)
    if not files:
        return None
    taken = choose_split(list(files), folder)
    left_out = {
        name: _SPLIT.format(split, taken) for split in files if split != taken for name in files[split]
    }
    kept = {*files[taken], *left_out, INFO_FILE}
    return Written(files[taken], False, left_out | {name: WORKING for name in names if name not in kept})


def _hub(folder: Path) -> Written:
    """datasets--OWNER--NAME in the cache of the hub: the snapshot that refs/main names, or the only one."""
    snapshots = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs/main"
    taken = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if taken not in snapshots:
        if len(snapshots) != 1:
            raise ValueError(
                f"{folder}/snapshots holds {', '.join(snapshots) or 'nothing'}, and refs/main names none of"
                " these; give the folder of one"
            )
        taken = snapshots[0]
    others = {f"snapshots/{name}": "snapshot(s) of another revision" for name in snapshots if name != taken}
    return Written([f"snapshots/{taken}"], False, others)


def _file_names(folder: Path, keys: Sequence[str]) -> list[str]:
    path = folder / STATE_FILE
    state = _object(path)
    entries: Any = next((state[key] for key in keys if state.get(key)), [])
    try:
        files = [_inside(path, entry["filename"]) for entry in entries]
    except (TypeError, KeyError):
        raise ValueError(f"{path}: {keys[0]} is not a list of file names; save the data set again") from None
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path} names {name!r}, but there is no file {folder / name}")
    if keys == _ROWS and not any(key in state for key in keys):
        raise ValueError(f"{path}: no file is named in _data_files; save the data set again")
    return files  # none for a data set without rows


def _names_files(path: Path) -> bool:
    """Whether a state.json without its companion is that of a saved data set."""
    try:
        return "_data_files" in _object(path)
    except ValueError:
        return False


def _inside(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{path}: {name!r} is no name of a file in this folder")
    return name


def _object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {printable(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: a {type(value).__name__} instead of an object")
    return value
