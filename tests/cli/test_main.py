"""The frame around the commands: help, exit statuses, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import loopmdm.cli
import loopmdm_kernels
from loopmdm.cli import COMMANDS

from .conftest import Call

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options
    )


def test_help_lists_every_command_and_does_not_import_torch() -> None:
    script = (
        "import sys; from loopmdm.cli import main; s = main(['--help']); print('torch' in sys.modules, s)"
    )
    done = python("-c", script)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == "False 0"
    assert all(f"  {name} " in done.stdout and summary in done.stdout for name, summary in COMMANDS.items())


def test_module_is_the_command() -> None:
    done = python("-m", "loopmdm", "--version")
    assert (done.returncode, done.stdout) == (0, f"loopmdm {loopmdm_kernels.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(call: Call, name: str) -> None:
    done = call(name, "--help")
    assert done.status == 0 and done.err == ""
    assert done.out.startswith(f"usage: loopmdm {name}")
    assert "example" in done.out and f"loopmdm {name}" in done.out.partition("example")[2]
    json = "--output_path" if name == "lm-eval" else "--json"  # an option of the harness
    assert json in done.out and "--debug" in done.out
    assert "exit status: 0 done; 1 failed, such as an input that is missing or damaged; 2 bad" in done.out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "which command?"),
        (["fly"], "invalid choice: 'fly'"),
        (["--fly"], "unrecognized arguments: --fly"),
        (["solve"], "the following arguments are required: FILE"),
        (["solve", "x", "--fly"], "unrecognized arguments: --fly"),
        (["smaple"], "did you mean 'sample'?"),
        (["sample", "x", "--tempreture", "1"], "did you mean '--temperature'?"),
        (["sample", "x", "--tempreture=1"], "did you mean '--temperature'?"),
        (["sample", "x", "--order", "confidance"], "did you mean 'confidence'?"),
        (["sample", "x", "--remask", "CAP"], "did you mean 'cap'?"),
        (["train", "--preset", "sudoku66"], "did you mean 'sudoku6'?"),
        (["study", "atention"], "did you mean 'attention'?"),
        (["study", "attention", "x", "--out", "y", "--samplse", "4"], "did you mean '--samples'?"),
    ],
)
def test_bad_usage_is_one_line(call: Call, words: list[str], message: str) -> None:
    done = call(*words)
    assert done.status == 2 and done.out == ""
    assert message in done.err and done.err.count("\n") == 1 and "--help" in done.err


def test_a_study_says_its_exit_status_too(call: Call) -> None:
    assert "exit status: 0 done" in call("study", "attention", "--help").out


def fake(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    command = SimpleNamespace(__doc__="", EPILOG="", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(loopmdm.cli, "import_module", lambda name: command)


def failing(error: BaseException) -> Any:
    def run(args: Any) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("rows is 3"), 1, "loopmdm eval: error: rows is 3\n"),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            1,
            "error: a.txt: No such file or directory\n",
        ),
        (KeyError("x"), 1, "loopmdm eval: error: KeyError: 'x' (--debug shows where)\n"),
        (ValueError(), 1, "loopmdm eval: error: ValueError: no message (--debug shows where)\n"),
        (
            loopmdm.cli.UsageError("--a: got 1"),
            2,
            "loopmdm eval: error: --a: got 1 (see loopmdm eval --help)\n",
        ),
        (KeyboardInterrupt(), 130, "loopmdm eval: interrupted\n"),
    ],
)
def test_failures(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    fake(monkeypatch, failing(error))
    done = call("eval")
    assert done.status == status and done.out == ""
    assert done.err.endswith(message) and done.err.startswith("loopmdm eval: ") and done.err.count("\n") == 1


def test_debug_shows_the_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, failing(KeyError("x")))
    with pytest.raises(KeyError):
        call("eval", "--debug")


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loopmdm", "--version"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(timeout=120) == 141
