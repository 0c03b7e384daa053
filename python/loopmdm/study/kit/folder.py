"""The folder of a study: finished items to go on from, and the table and figure made of them."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from loopmdm import terminal
from loopmdm.printable import printable
from loopmdm.runs.run_file import RUN_FILE
from loopmdm_kernels.files import open_append, refuse_files, write_files
from loopmdm_kernels.locks import LOCK_FILE, Lock
from loopmdm_kernels.values import parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from loopmdm.plan import ComputePlan

ITEMS_FILE = "items.jsonl"
ARMS = "arms"  # folder of models that a study trains
_PIN = "pin: "  # before the name of a fact that items depend on
PLAN_FILES = ("plan.json", "best-plan.json", "table-plan.json", "gate.json")
TABLE_JSON, TABLE_CSV, FIGURE_FILE = "table.json", "table.csv", "figure.png"
SECONDS_BETWEEN_LINES = 15.0

Row = dict[str, Any]


class StudyFolder:
    """Finished items of a study as lines of JSON, each written when it is done.

    The first line holds the study's name, its settings and the provenance of its start; a run with other
    settings is refused, one with the same settings computes only what is missing and writes the same table.
    A folder in which nothing is finished or in training takes any settings: it has nothing to lose.

    Attributes:
        facts: what the study adds to the provenance (executed network calls, precision, ...).
        findings: outcomes of the conditions the study checks, see `find`.
    """

    def __init__(
        self,
        path: str | Path,
        study: str,
        settings: dict[str, Any],
        provenance: dict[str, Any] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        """Open the folder, or start it.

        Args:
            path: made if it does not exist.
            study: name of the study.
            settings: JSON values, everything that decides the figures.
            provenance: of a new folder; the one stored is kept.
            progress: show progress on standard error.

        Raises:
            ValueError: the folder holds another study or other settings, a damaged file, or files that a new
                study would replace.
            LockedError: another process computes this study.
        """
        self.path = Path(path)
        self.study = study
        self.facts: dict[str, Any] = {}
        self.findings: list[dict[str, Any]] = []
        self._progress = progress
        self._items: dict[str, Any] = {}
        self._file = self.path / ITEMS_FILE
        header = {"study": study, "settings": _json(settings), "provenance": _json(provenance or {})}
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"--out: {self.path} is a file, expected a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            if not self._read(header):
                refuse_files(self.path, (TABLE_JSON, TABLE_CSV, FIGURE_FILE, *PLAN_FILES), "a new study")
                self._provenance = header["provenance"]
                write_files({self._file: json.dumps(header) + "\n"})

    def _lock(self) -> Lock:
        """While items are read or added: two studies at once would compute them twice and mix their lines."""
        return Lock(self.path / LOCK_FILE, str(self.path))

    def _read(self, header: dict[str, Any]) -> bool:
        """Read the items there are; whether there is a file."""
        if not self._file.is_file():
            return False
        text = self._file.read_bytes()
        whole, _, torn = text.rpartition(b"\n")
        if torn:  # the line that was being written when a run was killed
            write_files({self._file: whole + b"\n" if whole else b""})
        lines = whole.splitlines()
        if not lines:
            return False
        try:
            stored, *items = map(parse_json, lines)
            differing = _differences(stored["settings"], header["settings"])
            same_study = stored["study"] == header["study"]
            self._provenance = stored["provenance"]
            self._items = {item["key"]: item["value"] for item in items}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._file} is damaged ({error!r}); remove it to start again") from error
        if (differing or not same_study) and not self._has_results():
            self._items = {}  # of a command that was refused for its options, and is put right
            return False
        if not same_study:
            raise ValueError(f"{self.path} holds the study {stored['study']!r}, not {self.study!r}")
        if differing:
            raise ValueError(
                f"{self.path} holds a study with other options ({'; '.join(differing)});"
                " give the same ones, or another --out"
            )
        return True

    def _has_results(self) -> bool:
        """Whether an item is computed, or a model in training."""
        computed = any(not key.startswith(_PIN) for key in self._items)
        return computed or any(self.path.glob(f"{ARMS}/*/{RUN_FILE}"))

    def arm(self, name: str) -> Path:
        """The folder of a model that the study trains."""
        return self.path / ARMS / name

    def items(
        self,
        keys: Iterable[str],
        compute: Callable[[str], Any],
        what: str = "items",
        *,
        progress: bool = True,
    ) -> list[Any]:
        """The value of each key, computed where no earlier run has left it. Values are JSON values."""
        wanted = list(keys)
        missing = [key for key in dict.fromkeys(wanted) if key not in self._items]
        if missing:
            with self._lock(), open_append(self._file) as file:
                self._compute(missing, len(wanted), compute, what, file, progress and self._progress)
        return [self._items[key] for key in wanted]

    def _compute(
        self,
        missing: Sequence[str],
        total: int,
        compute: Callable[[str], Any],
        what: str,
        file: TextIO,
        shown: bool,
    ) -> None:
        with _Progress(what, total - len(missing), total, shown) as progress:
            for key in missing:
                line = json.dumps({"key": key, "value": compute(key)}, allow_nan=False)
                file.write(line + "\n")
                file.flush()
                self._items[key] = json.loads(line)["value"]  # a resumed run reads the same
                progress.advance(key)

    def pin(self, name: str, value: str) -> None:
        """Keep a fact the items depend on, such as the fingerprint of a model; a later run must agree.

        Raises:
            ValueError: the folder was begun with another value.
        """
        key = f"{_PIN}{name}"
        if self._items.get(key) != value and not self._has_results():
            self._items.pop(key, None)  # of the lines with a key the last one counts
        (kept,) = self.items([key], lambda _: value, progress=False)
        if kept != value:
            raise ValueError(
                f"{self.path} was begun with other {name} ({kept}, now {value}); give another --out"
            )

    def find(self, name: str, condition: str, outcome: str, holds: bool | None) -> None:
        """Record whether a condition holds (None: undecided), and the figures behind the verdict."""
        self.findings.append({"id": name, "condition": condition, "outcome": outcome, "holds": holds})

    def document(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The table with its provenance, as `table.json` holds it."""
        return {
            "study": self.study,
            "provenance": {**self._provenance, **_json(self.facts)},
            "findings": _json(self.findings),
            "rows": _json(list(rows)),
        }

    def write_plan(self, name: str, plan: ComputePlan) -> None:
        """Write a plan that the study has found, as one of `PLAN_FILES`."""
        assert name in PLAN_FILES
        write_files({self.path / name: plan.to_json() + "\n"})

    def write(self, rows: Sequence[Row], figure: Figure) -> None:
        """Write table.json, table.csv and figure.png, all of them or none."""
        if not rows:
            raise ValueError("rows is empty: a study has at least one row")
        document = self.document(rows)
        table = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_files(
            {
                self.path / TABLE_JSON: table,
                self.path / TABLE_CSV: csv_text(document),
                self.path / FIGURE_FILE: lambda path: figure.savefig(path, format="png"),
            }
        )


def csv_text(document: dict[str, Any]) -> str:
    """The rows as CSV, below the provenance and the findings in lines that start with `#`."""
    out = io.StringIO()
    for name, value in document["provenance"].items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        out.write(f"# {name}: {shown}\n".replace("\r", " "))
    for finding in document["findings"]:
        out.write(f"# finding: {json.dumps(finding, ensure_ascii=False)}\n")
    columns = list(dict.fromkeys(column for row in document["rows"] for column in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(document["rows"])
    return out.getvalue()


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, what: str, done: int, total: int, shown: bool) -> None:
        self._what, self._done, self._total = what, done, total
        self._shown = shown
        self._bar: Any = None
        self._last = time.monotonic()
        if shown and terminal.standard_error().isatty():
            from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

            columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=terminal.console())
            self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        elif self._shown and self._done:
            terminal.say(f"{self._what}: {self._done} of {self._total} done before")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, key: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self._shown and (
            time.monotonic() - self._last > SECONDS_BETWEEN_LINES or self._done == self._total
        ):
            self._last = time.monotonic()
            terminal.say(f"{self._what}: {self._done} of {self._total} ({printable(key)})")


def _differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {stored.get(name)!r}, is {given.get(name)!r}"
        for name in sorted({*stored, *given})
        if stored.get(name) != given.get(name)
    ]


def _json(value: Any) -> Any:
    """The value as it comes back from a file; what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return json.loads(json.dumps(value))
