"""The log of a run: one JSON object a line, appended as the run goes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from loopmdm_kernels.files import open_append, write_files
from loopmdm_kernels.values import parse_json

METRICS_FILE = "metrics.jsonl"
SMOOTHING_POINTS = 100  # about how many averages a curve is drawn through
_FIGURES = ("loss", "lr", "grad_norm", "num_loops", "tokens_per_second", "peak_memory", "mfu", "seconds")
_NUMBER = (int, float)
_RESULTS: dict[str, dict[str, tuple[type, ...]]] = {
    "held_out": {"num_loops": (int,), "nll": _NUMBER},
    "solved": {"num_loops": (int,), "order": (str,), "share_solved": _NUMBER},
    "samples": {"num_loops": (int,), "prompt": (str,), "text": (str,)},
}


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
    that was written anew is read anew: the file, or the line that was read last, is another.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.damaged = 0  # lines that are no records
        self._inode = self._offset = 0
        self._last = b""  # line that was read, which ends at the offset

    def read(self) -> bool:
        """Take what has come; whether anything has."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            status = os.fstat(file.fileno())
            file.seek(self._offset - len(self._last))
            if status.st_ino != self._inode or file.read(len(self._last)) != self._last:
                self.records, self.damaged, self._last = [], 0, b""
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        if end:
            self._offset += len(whole) + len(end)
            self._last = whole.rpartition(b"\n")[2] + end
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
    return record if _is_record(record) else None


def _is_record(value: Any) -> bool:
    """Whether it has a step, and those figures that it has are numbers."""
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    if "loss" in value and not (value["step"] > 0 and {"num_loops", "seconds"} <= value.keys()):
        return False
    return all(_fits(value[name], _NUMBER) for name in _FIGURES if name in value)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not (isinstance(value, float) and not math.isfinite(value))


def results(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What the evaluation of a record has under held_out, solved or samples.

    But not figures that are not finite, nor what an evaluation of one's own may have written there.
    """
    evaluation = record.get("evaluation")
    found = evaluation.get(name) if isinstance(evaluation, dict) else None
    return [
        one
        for one in (found if isinstance(found, list) else [])
        if isinstance(one, dict) and all(_fits(one.get(key), kinds) for key, kinds in _RESULTS[name].items())
    ]


def averages(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """A curve through about `SMOOTHING_POINTS` means of neighbours."""
    width = max(1, len(points) // SMOOTHING_POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def held_out(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Held-out NLL by step, for each S."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for result in results(record, "held_out"):
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
