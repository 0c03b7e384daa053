"""The log of a run: one JSON object a line, appended as the run goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loopmdm_kernels.files import open_append, write_files
from loopmdm_kernels.values import parse_json

METRICS_FILE = "metrics.jsonl"
SMOOTHING_POINTS = 100  # about how many averages a curve is drawn through


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


class Follower:
    """The records of a log that another process is writing.

    What is no record is left out and counted, but for the beginning of a last line, whose end may come. A log
    that a resumed run has written anew is read anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.damaged = 0  # lines that are no records
        self._inode = self._offset = 0

    def read(self) -> bool:
        """Take what has come; whether anything has."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self.records, self.damaged, self._inode, self._offset = [], 0, status.st_ino, 0
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        for line in whole.split(b"\n") if end else ():
            record = _record(line)
            if record is None:
                self.damaged += 1
            else:
                self.records.append(record)
        return bool(end)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line.decode())
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def averages(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """A curve through about `SMOOTHING_POINTS` means of neighbours."""
    width = max(1, len(points) // SMOOTHING_POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def held_out(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Held-out NLL by step, for each S."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for result in record.get("evaluation", {}).get("held_out", []):
            if result["nll"] is not None:  # not finite
                curves.setdefault(str(result["num_loops"]), []).append((record["step"], result["nll"]))
    return curves


def keep_until(path: Path, step: int) -> None:
    """Drop, atomically, the records of later steps than `step` and a last line cut short."""
    if not path.exists():
        return
    records = read_metrics(path)
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise ValueError(f"{path} is no log of a run: it has lines without a step")
    kept = [record for record in records if record["step"] <= step]
    write_files({path: "".join(json.dumps(record) + "\n" for record in kept)})
