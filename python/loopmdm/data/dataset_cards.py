"""Dataset cards: the README.md of a data set on the hub, and the files of each split that it names."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

_PROBE = 1 << 16
_KEY = re.compile(
    r"^(configs|dataset_info|license|language|pretty_name|tags|task_categories|size_categories|viewer):",
    re.MULTILINE,
)
_CONFIGS = re.compile(r"^configs:[ ]*\n((?:[ -].*\n?)*)", re.MULTILINE)
_SPLIT = re.compile(r"-?\s*split:\s*(\S+)")
_FILES = re.compile(r"-?\s*(?:path|data_files):\s*(.*)")
_ITEM = re.compile(r"-\s*([^:]+)")


def read_card(path: Path) -> str | None:
    """The YAML at the head of a dataset card; None if this file is none."""
    if path.name.lower() != "readme.md":
        return None
    with path.open("rb") as file:
        text = file.read(_PROBE).decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n")
    head, end, _ = text.removeprefix("---").partition("\n---")
    return head if text.startswith("---") and end and _KEY.search(head) else None


def split_patterns(card: str) -> dict[str, list[str]]:
    """The patterns of files that the card's `configs` name, by split; those without a split are train.

    Only the few forms that the hub documents are understood: a path or a list of them, below a split or not.
    """
    patterns: dict[str, list[str]] = {}
    configs = _CONFIGS.search(card)
    split = "train"
    for line in configs[1].splitlines() if configs else []:
        text = line.strip()
        if found := _SPLIT.fullmatch(text):
            split = _unquoted(found[1])
        elif found := _FILES.fullmatch(text):
            if "data_files" in text:
                split = "train"
            patterns.setdefault(split, []).extend(map(_unquoted, filter(None, [found[1]])))
        elif found := _ITEM.fullmatch(text):
            patterns.setdefault(split, []).append(_unquoted(found[1]))
    return {split: names for split, names in patterns.items() if names}


def split_in(patterns: dict[str, list[str]], path: PurePath) -> str | None:
    """The split whose patterns match a path relative to the card, train before others; None without one."""
    ordered = sorted(patterns, key=lambda split: (split != "train", split))
    return next((s for s in ordered if any(_matches(path, pattern) for pattern in patterns[s])), None)


def _matches(path: PurePath, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    return fnmatchcase(path.as_posix(), pattern) or fnmatchcase(path.as_posix(), pattern.replace("**/", ""))


def _unquoted(text: str) -> str:
    return text.strip().strip("\"'")
