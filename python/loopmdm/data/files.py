"""Which files a source of documents means: paths, patterns, folders, and folders that other tools wrote."""

from __future__ import annotations

import glob
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from loopmdm.data import dataset_cards, dataset_folders
from loopmdm.data.raw import COMPRESSED_SUFFIXES
from loopmdm.data.tokenizer import CONFIG_FILE as TOKENIZER_FILE

Source: TypeAlias = "str | os.PathLike[str]"

STDLIB = "stdlib"  # source name of the Python standard library's own sources
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_KINDS = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".jsonlines": "JSON lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
TEXT, SAVED = "text", "saved data set"
_ARCHIVES = {".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".npz", ".whl", ".jar"}
_ARCHIVES |= {".lz4", ".lzma", ".lzo", ".br", ".z", ".sz"}  # and compression that is not read
# Files of plain text that data sets split by name; other text, such as tests/test_x.py, is never a split.
_SPLIT_TEXT = {".txt", ".text", ".raw", ".tokens"}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog)\b", re.IGNORECASE)
_NAMED = 3


class DataFile(NamedTuple):
    """A file of documents, or the folder of a data set that the package datasets saved."""

    path: Path
    kind: str
    named: bool  # by the caller: then it must hold text; one found in a folder may be left out


class LeftOut(NamedTuple):
    path: Path
    why: str
    detail: str = ""  # of this file, where `why` is that of others too


@dataclass
class Found:
    """The files of sources in the order they are read, and what is there beside them."""

    sources: list[Source]
    files: list[DataFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def read(self) -> str:
        """What is read, in one line."""
        kinds = Counter(file.kind for file in self.files)
        counted = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        return f"{len(self.files):,} file(s) of {listed(self.sources)}: {counted}"

    def remarks(self, *, all_files: bool = True) -> list[str]:
        """What is left out and why, a line a reason; and what was decompressed, which others pass over.

        all_files: with those that the packages which wrote them do not read either.
        """
        reasons: dict[tuple[str, str], list[str]] = {}
        for path, why, detail in self.left_out:
            if all_files or why != dataset_folders.WORKING:
                names = reasons.setdefault(("left out", why), [])
                names.append(self._short(path) + (f": {detail}" if detail else ""))
        for file in self.files:
            if file.path.suffix.lower() in COMPRESSED_SUFFIXES and not file.named:
                reasons.setdefault(("read", "compressed file(s)"), []).append(self._short(file.path))
        return [f"{what}: {len(names):,} {why} ({listed(names)})" for (what, why), names in reasons.items()]

    def leave_out(self, reasons: Mapping[DataFile, str]) -> None:
        """Move files to those that are not read."""
        self.files = [file for file in self.files if file not in reasons]
        self.left_out += [LeftOut(file.path, why) for file, why in reasons.items()]

    def _short(self, path: Path) -> str:
        """Relative to the source it comes from, if that is a folder."""
        for source in self.sources:
            if path != Path(source) and path.is_relative_to(source):
                return str(path.relative_to(source))
        return str(path)


def find_files(sources: Iterable[Source], suffixes: set[str] | None = None) -> Found:
    """The files of paths, patterns ("data/**/*.txt"), folders and "stdlib"; a file is taken once.

    Folders are read recursively, through links, in sorted order, without hidden files. What `datasets` wrote
    (`save_to_disk`, its cache, a snapshot of the hub) is read as its own files say. Of files named by split,
    train is taken.

    Raises:
        FileNotFoundError: a path does not exist, a pattern matches nothing, a data set lacks a file.
        ValueError: a folder without files, a damaged description of a data set, splits without train.
    """
    found = Found(list(sources))
    for source in found.sources:
        for path, named in _expand(source):
            if path.is_dir() and not (source == STDLIB and named):
                _add_folder(found, path, suffixes)
            else:
                _add_file(found, path, named)
    _leave_out_working_files(found)
    found.files = _once(found)
    return found


def listed(names: Sequence[Source]) -> str:
    """The first names, and how many there are more."""
    more = [f"and {len(names) - _NAMED:,} more"] if len(names) > _NAMED else []
    return ", ".join([*map(str, names[:_NAMED]), *more])


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds: that under the one of the compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in COMPRESSED_SUFFIXES:
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


def is_archive(path: Path) -> bool:
    """Whether a name is that of many files in one, or of compression that `open_raw` does not know."""
    return suffix_of(path) in _ARCHIVES


def _expand(source: Source) -> Iterator[tuple[Path, bool]]:
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if not _STDLIB_EXCLUDED & set(f.relative_to(root).parts)]
        if not files:
            raise ValueError(f"source 'stdlib': no .py files under {root}, this Python comes without sources")
        names: dict[Path, Path] = {}  # a distribution may have a file under two
        for file in sorted(files):
            names.setdefault(file.resolve(), file)
        yield from ((file, True) for file in names.values())
        return
    text = os.fspath(source)
    if os.path.exists(text):
        yield Path(text), True
        return
    if os.path.lexists(text):
        raise FileNotFoundError(f"source {text!r} is a link to a file that does not exist")
    if not glob.has_magic(text):
        raise FileNotFoundError(f"source {text!r} does not exist; accepted: a file, a folder or 'stdlib'")
    matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
    if "**" in text:  # matches folders and what is in them
        matches = [path for path in matches if not path.is_dir()]
    if not matches:
        raise FileNotFoundError(f"source {text!r}: no file matches this pattern")
    yield from ((path, False) for path in matches)


def _add_file(found: Found, path: Path, named: bool) -> None:
    why = None if named else _not_regular(path)
    if why is not None:
        found.left_out.append(LeftOut(path, why))
    else:
        found.files.append(DataFile(path, _KINDS.get(suffix_of(path), TEXT), named))


def _not_regular(path: Path) -> str | None:
    """Why a path of a folder cannot hold a document, or None: a FIFO could be waited for forever."""
    try:
        return None if stat.S_ISREG(path.stat().st_mode) else "FIFO(s), socket(s) or device(s)"
    except OSError:
        return "link(s) to nothing" if path.is_symlink() else "file(s) that cannot be read"


def _add_folder(found: Found, folder: Path, suffixes: set[str] | None) -> None:
    here = Found([folder])
    above = set(folder.resolve().parents)
    links: list[Path] = []
    pending, seen = [folder], set()
    while pending or links:
        # What a link leads to is read under its own name where it has one in the folder.
        path = pending.pop() if pending else links.pop(0)
        if path.is_symlink() and path.resolve() in above:
            here.left_out.append(LeftOut(path, "link(s) to a folder that this one is in"))
            continue
        status = path.stat()
        if status.st_ino and (status.st_dev, status.st_ino) in seen:
            here.left_out.append(LeftOut(path, "link(s) to a folder that is read already"))
            continue
        seen.add((status.st_dev, status.st_ino))
        for child in _add_entries(here, path):
            (links if child.is_symlink() else pending).append(child)
    if suffixes is not None:
        here.files = [file for file in here.files if _suffixes(file) & suffixes]
    here.files.sort()
    _leave_out_descriptions(here)
    _take_train(here, folder)
    found.files += here.files
    found.left_out += sorted(here.left_out)
    if not here.files:
        kind = "no files" if suffixes is None else f"no files ending in {', '.join(sorted(suffixes))}"
        raise ValueError("; ".join([f"folder {folder} holds {kind}", *here.remarks()]))


def _suffixes(file: DataFile) -> set[str]:
    return {".arrow"} if file.kind == SAVED else {file.path.suffix.lower(), suffix_of(file.path)}


def _add_entries(here: Found, folder: Path) -> Iterator[Path]:
    """Add the files of one folder; yields the folders in it to go on with."""
    names = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    if _is_written_here(names):
        here.left_out.append(LeftOut(folder, "folder(s) of runs and corpora"))
        return
    written = dataset_folders.read(folder, names)
    if written is not None:
        here.left_out += [LeftOut(folder / name, why) for name, why in written.left_out.items()]
        if written.saved:
            here.files.append(DataFile(folder, SAVED, False))
        names = written.names
    for name in names:
        path = folder / name
        if path.is_dir():
            if name.endswith(".incomplete"):
                here.left_out.append(LeftOut(path, "unfinished download(s)"))
            elif name != "__pycache__":
                yield path
        elif dataset_folders.is_lock(path):
            here.left_out.append(LeftOut(path, dataset_folders.WORKING))
        else:
            _add_file(here, path, False)


def _is_written_here(names: Sequence[str]) -> bool:
    """Whether these are the files of a folder that `loopmdm` wrote, among its data perhaps."""
    begun = TOKENIZER_FILE in names  # the first file of a run or a corpus of text
    return begun or ("run.json" in names and not {"train_config.json", "model.safetensors"}.isdisjoint(names))


def _leave_out_descriptions(here: Found) -> None:
    """What is about the data files of a folder: README, LICENSE and the like beside or above them."""
    holders = {parent for f in here.files if f.kind != TEXT for parent in f.path.parents}
    cards: dict[Path, str] = {}
    reasons: dict[DataFile, str] = {}
    for file in [f for f in here.files if f.kind == TEXT]:
        folder = file.path.parent
        card = dataset_cards.read_card(file.path)
        beside = folder in holders or dataset_folders.is_snapshot(folder)
        if card is None and not (beside and _ABOUT.match(file.path.name)):
            continue
        reasons[file] = "text file(s) about the data beside them" if card is None else "dataset card(s)"
        if card is not None:
            cards[folder] = card
    here.leave_out(reasons)
    for folder, card in cards.items():
        _follow_card(here, folder, dataset_cards.split_patterns(card))


def _follow_card(here: Found, folder: Path, patterns: dict[str, list[str]]) -> None:
    """Of the files beside a dataset card and below, those of the split train that the card names."""
    below = [file for file in here.files if file.path.is_relative_to(folder)]
    splits = [dataset_cards.split_in(patterns, file.path.relative_to(folder)) for file in below]
    if not any(splits):  # no names, or those of files that are elsewhere
        return
    taken = dataset_folders.choose_split(list(patterns), folder)
    here.leave_out(
        {
            file: "file(s) that the dataset card does not name"
            if split is None
            else f"file(s) of split {split}, as {taken} is there"
            for file, split in zip(below, splits, strict=True)
            if split != taken
        }
    )


def _take_train(here: Found, folder: Path) -> None:
    """Of files that are named by split, as those of the hub are, train."""
    splits = {f: _split_of(f.path.relative_to(folder)) for f in here.files if f.kind != TEXT}
    text = {f: _split_of(f.path.relative_to(folder)) for f in here.files if _may_be_split(f)}
    if None not in text.values():  # else words such as "test" are of the language
        splits |= text
    known = {split for split in splits.values() if split is not None}
    if "train" not in known:
        if len(known) > 1 and None not in splits.values():
            names = ", ".join(sorted(known))
            raise ValueError(f"folder {folder} holds the splits {names} and no train; give the files of one")
        return
    here.leave_out(
        {
            file: f"file(s) of split {split}, as train is there"
            for file, split in splits.items()
            if split not in (None, "train")
        }
    )


def _may_be_split(file: DataFile) -> bool:
    about = _ABOUT.match(file.path.name) is not None
    return file.kind == TEXT and suffix_of(file.path) in _SPLIT_TEXT and not about


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.name.lower())
    folders = [re.split(r"[^a-z]+", part.lower())[-1] for part in path.parts[:-1]]
    return next((_SPLITS[word] for word in [*words, *reversed(folders)] if word in _SPLITS), None)


def _leave_out_working_files(found: Found) -> None:
    """Of a saved data set whose files are named one by one (by a pattern), those that are not of it."""
    folders = {file.path.parent for file in found.files if file.kind == "arrow"}
    for folder in sorted(f for f in folders if (f / dataset_folders.STATE_FILE).is_file()):
        rows = set(dataset_folders.saved_files(folder))
        here = [file for file in found.files if file.path.parent == folder and file.kind != SAVED]
        if any(file.path.name in rows for file in here):
            others = [file for file in here if file.path.name not in rows]
            found.leave_out(dict.fromkeys(others, dataset_folders.WORKING))


def _once(found: Found) -> list[DataFile]:
    """Each file under one name: the one given, else the one that is no link, else the first."""
    first: dict[tuple[int, int], DataFile] = {}
    again: set[int] = set()
    for file in sorted(found.files, key=lambda f: (not f.named, f.path.is_symlink())):
        status = file.path.stat()
        known = first.setdefault((status.st_dev, status.st_ino), file)
        # A file system without numbers of its own has 0 for all.
        if known is not file and status.st_ino and stat.S_ISREG(status.st_mode):
            again.add(id(file))
            found.left_out.append(LeftOut(file.path, "more name(s) of files that are read"))
    return [file for file in found.files if id(file) not in again]
