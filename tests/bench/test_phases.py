"""Phases of a GPU script that fail cost themselves only, and what was found is there whenever it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from bench import phases
from tests.bench import planted_phases

ROOT = Path(__file__).parents[2]


def command(folder, *arguments):
    return [sys.executable, "-W", "ignore", "-m", "tests.bench.planted_phases", "--out", folder, *arguments]


def run(folder, *arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python", **environment}
    return subprocess.run(
        command(folder, *arguments), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def result_in(folder):
    (path,) = folder.glob("*-planted.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "new"
    done = run(folder)
    return folder, done, result_in(folder)


def test_each_costs_itself_only(whole):
    _, _, result = whole
    found = {name: phase.get("failed") for name, phase in result["phases"].items()}
    assert found == {
        "right": None,
        "hangs": "not done after 8 s",
        "crashes": "ended by SIGSEGV",
        "ends": "ended with status 3",
        "fails": "RuntimeError: no kernel image",
        "is left out": None,
        "is wrong": None,
        "last": None,
        "waits": None,
    }
    assert result["phases"]["is left out"]["left out"] == "needs an H100"
    assert result["phases"]["right"]["figures"] == {"value": 2.0, "run": "False"}
    for name in ("hangs", "crashes", "ends", "fails"):
        figures = result["phases"][name]["figures"]
        assert figures["first"] == "right" and figures["time"]["ms"] == 1.5, "what it had found is kept"
    assert result["phases"]["hangs"]["seconds"] < 500, "its own child, which would sleep for longer, ends"
    assert result["targets"] == {"of nothing": None, "too high": False, "the last is 3": True}


def test_the_summary_comes_last_and_the_log_has_the_rest(whole):
    folder, done, result = whole
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "FAILED hangs: not done after 8 s" in lines
    assert "FAILED is wrong, first: wrong: far off" in lines
    assert "MISSED too high" in lines and "met the last is 3" in lines
    assert "is left out: left out: needs an H100; 1 right; time 1.5 (2) ms; 1755-1980 MHz" in lines
    assert "is wrong: first wrong: far off; time 1.5 (2) ms; 1755-1980 MHz" in lines
    assert lines[-2].startswith("5 failed; all figures: ") and lines[-1].startswith("kept: {'value': 2.0")
    (log,) = folder.glob("*-log.txt")
    text = log.read_text()
    assert text.index("==== fails") < text.index("what it printed") < text.index("Traceback")
    assert "what it printed" not in done.stdout + done.stderr
    assert [line.split(" s  ")[1] for line in done.stderr.splitlines()] == list(result["phases"])


def test_a_part_of_it(tmp_path):
    done = run(tmp_path, "--quick", "--dry-run", PLANTED_REASON="there is no GPU")
    result = result_in(tmp_path)
    assert list(result["phases"]) == ["right", "fails"] and "dry run" in result["command"]
    assert result["phases"]["right"]["figures"]["run"] == "True" and "kept" not in done.stdout
    done = run(tmp_path, PLANTED_REASON="there is no GPU")
    assert done.returncode == 1 and "bench.planted: there is no GPU; --dry-run" in done.stderr


def planted_script():
    return phases.Script(
        "planted", planted_phases.PHASES, str, lambda: None, lambda figures: {}, lambda _: None
    )


def test_phases_are_chosen_by_their_beginnings():
    chosen = partial(phases.chosen, planted_script(), quick=False)
    assert chosen("is,la", dry=False) == ["is left out", "is wrong", "last"]
    assert chosen("is", dry=True) == ["is left out", "is wrong"]
    with pytest.raises(ValueError, match="got 'xyz', expected the beginning of some of right, hangs"):
        chosen("right,xyz", dry=False)


def test_without_time_nothing_begins(tmp_path, capsys):
    result = phases.measure(planted_script(), ["right", "hangs"], 0.05, tmp_path, dry=False)
    assert result["skipped"] == ["right", "hangs"]
    assert "not run, there was no time: right, hangs" in capsys.readouterr().out


def test_stopped_it_leaves_what_there_is(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python", "PLANTED_WAIT": "600"}
    arguments = command(tmp_path, "--only", "right,waits")
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if line.endswith("waits\n"):
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
    assert process.returncode == 143
    assert list(result_in(tmp_path)["phases"]) == ["right"]
    assert "right: value 2; run False" in said.splitlines()


def test_a_summary_has_a_hundred_lines_at_most():
    figures = {"phases": {f"phase {n}": {"figures": {"x": "wrong: " + "y" * 300}} for n in range(150)}}
    result = {"date": "today", "file": "f", "skipped": ["late"], **figures}
    lines = phases.summary(result)
    assert len(lines) == phases.LINES and max(map(len, lines)) == phases.COLUMNS
    assert "FAILED 120 more" in lines and lines[-1] == "150 failed; all figures: f"
    assert lines[-3].endswith("more lines: see the file")


def test_a_line_of_times():
    times = {name: {"ms": 1.23456, "cold ms": 2.0, "MHz": [1980.0, 1755.0], "W": [500]} for name in "abc"}
    assert phases._lines("T128", {"figures": {**times, "d": "no kernel image", "e": None, "f": "right"}}) == [
        "T128: 1 right; a 1.235 (2) ms; b 1.235 (2) ms; c 1.235 (2) ms; d no kernel image; "
        "1755-1980 MHz; 500-500 W"
    ]
    many = phases._lines(
        "T128", {"failed": "it hangs", "figures": {f"peer {n}": times["a"] for n in range(99)}}
    )
    assert (
        len(many) == 2 and many[0].startswith("T128: failed: it hangs; peer 0") and many[1].endswith(" ...")
    )
