"""The log of a run: one JSON object a line, appended as the run goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loopmdm_kernels.files import open_append, write_files
from loopmdm_kernels.values import parse_json

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends records to a file; every record is one line, handed to the system at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_append(path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"cannot append to {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a log. A last line cut short by a kill is left out; damage elsewhere is an error."""
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a JSON record: {error}") from error
    return records


def keep_until(path: Path, step: int) -> None:
    """Drop, atomically, the records of later steps than `step` and a last line cut short."""
    if not path.exists():
        return
    records = read_metrics(path)
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise ValueError(f"{path} is no log of a run: it has lines without a step")
    kept = [record for record in records if record["step"] <= step]
    write_files({path: "".join(json.dumps(record) + "\n" for record in kept)})
