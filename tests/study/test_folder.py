"""The folder of a study: resuming, refusing, and the files it writes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from loopmdm.study.kit.folder import StudyFolder

SETTINGS = {"windows": 4, "models": ["a", "b"]}


def open_folder(path: Path, **changes: Any) -> StudyFolder:
    return StudyFolder(path, "count", SETTINGS | changes, {"date": "then"}, progress=False)


def value(key: str) -> dict[str, Any]:
    return {"third": int(key) / 3, "parts": (1, 2)}


def table(folder: StudyFolder) -> list[dict[str, Any]]:
    values = folder.items(["1", "2", "3"], value, "numbers")
    return [{"number": i, "third": v["third"], "odd": v["parts"]} for i, v in enumerate(values)]


def files(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in ("table.json", "table.csv")]


def test_a_study_that_was_interrupted_goes_on_and_writes_the_same_table(tmp_path: Path) -> None:
    whole = open_folder(tmp_path / "whole")
    whole.write(table(whole), Figure())

    def interrupted(key: str) -> dict[str, Any]:
        if key == "2":
            raise KeyboardInterrupt
        return value(key)

    with pytest.raises(KeyboardInterrupt):
        open_folder(tmp_path / "parts").items(["1", "2", "3"], interrupted)
    with (tmp_path / "parts" / "items.jsonl").open("a") as file:
        file.write('{"key": "2", "val')  # killed while it wrote
    seen: list[str] = []

    def counted(key: str) -> dict[str, Any]:
        seen.append(key)
        return value(key)

    folder = StudyFolder(tmp_path / "parts", "count", SETTINGS, {"date": "now"}, progress=False)
    folder.items(["1", "2"], counted)
    assert seen == ["2"]
    again = open_folder(tmp_path / "parts")
    again.write(table(again), Figure())
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert again.items(["3", "1"], lambda key: pytest.fail(key)) == whole.items(["3", "1"], pytest.fail)


def test_a_torn_first_line_starts_the_folder_again(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"study": "co')
    assert open_folder(tmp_path).items(["1"], value) == [{"third": 1 / 3, "parts": [1, 2]}]
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 2


def test_table_csv_and_json_hold_the_same(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.facts["network_calls"] = 12
    folder.find("X1", "a holds", "a = 2", True)
    folder.write([{"a": 2, "b": math.nan, "c": "x, y"}, {"a": 0.1, "d": None}], Figure())
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["provenance"] == {"date": "then", "network_calls": 12}
    assert document["findings"] == [{"id": "X1", "condition": "a holds", "outcome": "a = 2", "holds": True}]
    assert document["rows"] == [{"a": 2, "b": None, "c": "x, y"}, {"a": 0.1, "d": None}]
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[:2] == ["# date: then", "# network_calls: 12"] and lines[2].startswith("# finding: ")
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert rows == [{"a": "2", "b": "", "c": "x, y", "d": ""}, {"a": "0.1", "b": "", "c": "", "d": ""}]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    open_folder(tmp_path).items(["1"], value)
    with pytest.raises(ValueError, match=r"windows was 4, is 5.*--out"):
        open_folder(tmp_path, windows=5)
    with pytest.raises(ValueError, match="seed was None, is 1"):
        open_folder(tmp_path, seed=1)
    with pytest.raises(ValueError, match="holds the study 'count', not 'other'"):
        StudyFolder(tmp_path, "other", SETTINGS)
    (tmp_path / "items.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="damaged"):
        open_folder(tmp_path)


def test_a_folder_without_a_finished_item_takes_other_settings(tmp_path: Path) -> None:
    """A command that was refused after its folder was begun, put right."""
    open_folder(tmp_path).pin("weights of a", "1f")
    folder = open_folder(tmp_path, windows=5)
    folder.pin("weights of a", "2e")
    trained = folder.arm("a-seed0") / "run.json"
    trained.parent.mkdir(parents=True)
    trained.touch()
    with pytest.raises(ValueError, match="windows was 5, is 4"):
        open_folder(tmp_path)
    trained.unlink()
    folder.items(["1"], value)
    with pytest.raises(ValueError, match="windows was 5, is 4"):
        open_folder(tmp_path)


def test_a_pinned_fact_must_not_change(tmp_path: Path) -> None:
    open_folder(tmp_path).pin("weights of a", "2e")
    open_folder(tmp_path).pin("weights of a", "1f")  # nothing is computed yet
    open_folder(tmp_path).items(["1"], value)
    open_folder(tmp_path).pin("weights of a", "1f")
    with pytest.raises(ValueError, match="begun with other weights of a"):
        open_folder(tmp_path).pin("weights of a", "2e")


def test_values_must_be_finite_json(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        folder.items(["1"], lambda key: math.inf)
    with pytest.raises(ValueError, match="rows is empty"):
        folder.write([], Figure())


def test_progress_says_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = StudyFolder(tmp_path, "count", SETTINGS)
    folder.items(["1", "2"], value, "numbers")
    folder.items(["1", "2", "3"], value, "numbers")
    assert capsys.readouterr().err.splitlines() == [
        "numbers: 2 of 2 (2)",
        "numbers: 2 of 3 done before",
        "numbers: 3 of 3 (3)",
    ]
