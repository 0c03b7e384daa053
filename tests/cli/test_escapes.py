"""Nothing that a command prints can act on the terminal, wherever the text is from."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import loopmdm.cli
from loopmdm.cli.output import print_json, print_table, show
from loopmdm.sampling import StepEvent
from loopmdm.terminal import note
from loopmdm.train.progress import Progress
from loopmdm.view import IdSymbols, page

from .conftest import STEPS, TINY, Call
from .test_streams import ENVIRONMENT

ESCAPES = "\x1b[2J\x9b2J\u202e\r\x7fok"


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def fake(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    command = SimpleNamespace(__doc__="", EPILOG="", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(loopmdm.cli, "import_module", lambda name: command)


def test_everything_a_command_says(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Any) -> int:
        warnings.simplefilter("always")
        note(f"note {ESCAPES}")
        show(f"shown {ESCAPES}")
        warnings.warn(f"warning {ESCAPES}", stacklevel=1)
        print_table((ESCAPES, "b"), [(ESCAPES, ESCAPES)])
        print_json({ESCAPES: ESCAPES, "kept": "ä中"})
        Progress(3, 0, True).note(f"evaluated {ESCAPES}")
        raise ValueError(f"error {ESCAPES}\nsecond line")

    fake(monkeypatch, run)
    done = call("eval")
    assert done.status == 1 and printable(done.out) and printable(done.err)
    assert all(word in done.err for word in ("note", "warning", "evaluated", "error", "\nsecond line"))
    document = json.loads(done.out[done.out.index("{") :])
    assert document == {ESCAPES: ESCAPES, "kept": "ä中"}


def test_json_is_readable_where_it_may_be(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Any) -> int:
        print_json({"kept": "ä中"})
        return 0

    fake(monkeypatch, run)
    assert "ä中" in call("eval").out


@pytest.mark.parametrize(
    "words",
    [
        [ESCAPES],
        [f"--{ESCAPES}"],
        ["solve", "x", f"--{ESCAPES}"],
        ["solve", "x", ESCAPES],
        ["sample", ESCAPES],
        ["solve", ESCAPES],
        ["eval", ESCAPES],
        ["convert", ESCAPES, "DIR"],
        ["train", "--data", ESCAPES, "--out", "DIR"],
        ["train", "--resume", "--out", ESCAPES],
        ["train", "--preset", ESCAPES, "--out", "DIR"],
        ["sample", "x", "--order", ESCAPES],
        ["sample", "x", "--loops", ESCAPES],
        ["sample", "x", "--html", f"/{ESCAPES}/x"],
        ["bench", "--preset", ESCAPES],
        ["study", ESCAPES],
    ],
)
def test_words_of_the_command_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*words)
    assert done.status in (1, 2) and printable(done.err) and printable(done.out)


def test_a_run_whose_path_would_act_on_the_terminal(call: Call, tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / ESCAPES
    trained = call("train", "--data", corpus, "--out", out, *TINY, *STEPS)
    sampled = call("sample", out, "--num", 1, "--length", 8, "--steps", 2, "--html", out / "page.html")
    measured = call("eval", out, "--windows", 2, "--num-t", 1, "--loops", 1)
    resumed = call("train", "--resume", "--out", out, "--steps", 6, "--json")
    for done in (trained, sampled, measured, resumed):
        assert printable(done.out) and printable(done.err), (done.out, done.err)
    assert [done.status for done in (trained, sampled, measured)] == [0, 0, 0]
    assert not set(ESCAPES[:1] + "\x9b\u202e\x7f") & set((out / "page.html").read_text())


def test_a_traceback_is_escaped_too() -> None:
    script = (
        "import sys, types, loopmdm.cli\n"
        "def run(args):\n    raise ValueError(sys.argv[1])\n"
        "command = types.SimpleNamespace(__doc__='', EPILOG='', add_arguments=lambda p: None, run=run)\n"
        "loopmdm.cli.import_module = lambda name: command\n"
        "sys.exit(loopmdm.cli.main(['eval', '--debug']))\n"
    )
    command = [sys.executable, "-c", script, ESCAPES.replace("\r", "")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" in done.stderr and printable(done.stderr)


def test_a_page_has_its_texts_as_text() -> None:
    import torch

    hostile = f"<script>alert(1)</script>&\"'{ESCAPES}</title><!--"
    event = StepEvent(
        0, torch.tensor([0]), torch.tensor([1]), torch.tensor([2]), torch.tensor([0.5]), torch.tensor([1])
    )
    text = page(
        torch.tensor([[1, 9]]),
        9,
        [event],
        IdSymbols(),
        title=hostile,
        titles=[hostile],
        facts={hostile: hostile},
    )
    assert text.count("<script") == text.count("</script>") == 2 and "alert(1)</script>" not in text
    assert not set("\x1b\x9b\u202e\x7f\r") & set(text)
