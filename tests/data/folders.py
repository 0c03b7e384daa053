"""Folders of text as tests write them, and what is read from one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from loopmdm.data.text import read_documents


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
