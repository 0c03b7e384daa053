"""run.json: what is not what a run writes is named, with the file, before anything is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loopmdm.runs.run_file import RunFile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "txt"}, "preset: got 'txt', expected one of sudoku, sudoku6, text, tiny, small, med"),
        ({"preset": 3}, "preset: got 3, expected text"),
        ({"preset": None}, "preset: got None, expected text"),
        ({"model": [1]}, "model: got [1], expected an object"),
        ({"model": {"hiden_size": 3}}, "model: unknown fields hiden_size"),
        ({"training": {"step": 3}}, "unknown training option step"),
        ({"training": {"steps": "many"}}, "steps must be int, got 'many'"),
        ({"training": None}, "training: got None, expected an object"),
        ({"length": "long"}, "length: got 'long', expected an integer or null"),
        ({"length": True}, "length: got True, expected an integer or null"),
        ({"validation": 1.5}, "validation: got 1.5, expected a share in [0, 1)"),
        ({"autoregressive": 1}, "autoregressive: got 1, expected true or false"),
        ({"data": 3}, "data: got 3, expected text, a list of them or null"),
        ({"preset": "\x1b[2J"}, "preset: got '\\x1b[2J', expected one of"),
        ({"new": 3}, "was not written by this version of loopmdm"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_named_with_the_file(
    call: Any, text_run: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    path = run / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for words in (["eval", run], ["sample", run, "--num", "1"], ["train", "--resume", "--out", run]):
        done = call(*words)
        assert done.status == 1 and done.out == "", words
        assert f"{path}" in done.err and message in done.err, words
        assert done.err.count("\n") == 1 and "\x1b" not in done.err


def test_what_a_run_writes_is_read(text_run: Path) -> None:
    run = RunFile.read(text_run)
    assert run is not None and run.preset == "text" and run.training["steps"] == 4
