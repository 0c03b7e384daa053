"""Standard output and error that are closed, full, left by their reader, or of a small encoding."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loopmdm_kernels
from loopmdm import terminal
from loopmdm.train import read_metrics

from .conftest import STEPS, TINY, Call

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
LIKE_A_COMMAND = """
import sys, types
import loopmdm.cli
from loopmdm.cli.output import print_json, print_table
from loopmdm.terminal import note

def run(args):
    with open(sys.argv[1], "w") as opened:  # must not become standard output
        note("on the way to \\u27e8eos\\u27e9")
        print_table(("S", "\\u00b1 s.e."), [("1", "0.1"), ("12", "\\u00b7\\u4e2d\\x1b")])
        if args.json:
            print_json({"text": "\\u00b7\\u4e2d\\ud800"})
        print("x" * int(sys.argv[2]), flush=True)
        opened.write("whole")
    return 0

def add_arguments(parser):
    parser.add_argument("--json", action="store_true")

command = types.SimpleNamespace(__doc__="", EPILOG="", run=run, add_arguments=add_arguments)
loopmdm.cli.import_module = lambda name: command
sys.exit(loopmdm.cli.main(["eval", *sys.argv[3:]]))
"""


def shell(redirect: str, *words: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python on words with redirections such as >&- (a closed standard output)."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, timeout=600)


def like_a_command(path: Path, redirect: str, *words: str, much: int = 0, **environment: str) -> Any:
    return shell(redirect, "-c", LIKE_A_COMMAND, path, much, *words, **environment)


@pytest.mark.parametrize("redirect", [">&-", "<&- >&-", "<&- >&- 2>&-", "2>&-", "<&-"])
def test_closed_streams(tmp_path: Path, redirect: str) -> None:
    done = like_a_command(tmp_path / "file", redirect, "--json")
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "whole"
    if ">&-" not in redirect.split():
        assert done.stdout.endswith(b"\n\n") and b"on the way" not in done.stdout
    assert done.stderr == (b"" if "2>&-" in redirect else "on the way to ⟨eos⟩\n".encode())
    assert shell(redirect, "-m", "loopmdm", "--version").returncode == 0


TABLES = {
    "ascii": "S   +- s.e.\n--  -------\n1       0.1\n12   .?\\x1b\n\n",
    "latin-1": "S   ± s.e.\n--  ------\n1      0.1\n12  ·?\\x1b\n\n",
    "cp437": "S   ± s.e.\n──  ──────\n1      0.1\n12  ·?\\x1b\n\n",
    "utf-8": "S   ± s.e.\n──  ──────\n1      0.1\n12  ·中\\x1b\n\n",
}


@pytest.mark.parametrize("encoding", TABLES)
def test_small_encodings_lose_characters_only(tmp_path: Path, encoding: str) -> None:
    done = like_a_command(tmp_path / "file", "", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert done.stdout.decode(encoding) == TABLES[encoding]
    eos = "⟨eos⟩" if encoding == "utf-8" else "<eos>"
    assert done.stderr.decode(encoding) == f"on the way to {eos}\n"
    done = like_a_command(tmp_path / "file", "", "--json", PYTHONIOENCODING=encoding)
    document = done.stdout.decode(encoding).partition("{")
    assert json.loads("{" + document[2]) == {"text": "·中\ud800"}  # a document is whole in any encoding


def test_an_ascii_locale(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = like_a_command(tmp_path / "file", "", **plain)
    assert done.returncode == 0 and done.stdout.decode("ascii") == TABLES["ascii"]


def test_what_a_user_asks_for_is_kept(tmp_path: Path) -> None:
    done = like_a_command(tmp_path / "file", "", PYTHONIOENCODING="ascii:xmlcharrefreplace")
    assert done.returncode == 0 and b"&#177; s.e." in done.stdout


@pytest.mark.parametrize("much", [0, 1_000_000])
def test_the_reader_of_the_output_leaves(tmp_path: Path, much: int) -> None:
    command = [sys.executable, "-c", LIKE_A_COMMAND, str(tmp_path / "file"), str(much)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read().decode() == "on the way to ⟨eos⟩\n"
    assert process.wait(timeout=600) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("much", [0, 1_000_000])
def test_a_full_disk_behind_the_output(tmp_path: Path, much: int) -> None:
    done = like_a_command(tmp_path / "file", ">/dev/full", much=much)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()[1:]
    assert line.startswith("loopmdm eval: error: ") and line.endswith("No space left on device")
    assert like_a_command(tmp_path / "file", "2>/dev/full").returncode == 0


def test_the_reader_of_messages_leaves(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIKE_A_COMMAND, str(tmp_path / "file"), "0"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stderr.close()
    with process.stdout as printed:
        assert printed.read().decode().startswith("S   ± s.e.\n")
    assert process.wait(timeout=600) == 0 and (tmp_path / "file").read_text() == "whole"


def test_a_training_goes_on_when_nobody_reads_its_messages(
    tmp_path: Path, corpus: Path, text_run: Path
) -> None:
    """With the terminal gone, also the note about a signal cannot be written."""
    out = tmp_path / "run"
    words = ["train", "--data", corpus, "--out", out, *TINY, *STEPS]
    command = [sys.executable, "-m", "loopmdm", *map(str, words)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and b"The model is in" in printed
    one, other = (read_metrics(folder / "metrics.jsonl") for folder in (out, text_run))
    assert [r.get("loss") for r in one] == [r.get("loss") for r in other]
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, text_run))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_version_with_nobody_to_read_it() -> None:
    assert (
        shell("", "-m", "loopmdm", "--version").stdout == f"loopmdm {loopmdm_kernels.__version__}\n".encode()
    )
    assert shell(">&-", "-m", "loopmdm", "--help").returncode == 0


class Broken(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "gone"), OSError(errno.EIO, "gone"), ValueError("closed"), None]
)
def test_messages_and_bars_on_a_broken_terminal(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    from loopmdm.sampling.progress import progress_bar
    from loopmdm.train.progress import Progress

    monkeypatch.setattr(sys, "stderr", None if error is None else Broken(error))
    terminal.say("message")
    with Progress(2, 0, True) as progress:
        progress.note("evaluated")
        progress.training({"step": 1, "loss": 1.0, "num_loops": 1, "lr": 0.1, "tokens_per_second": 3.0}, 1.0)
    with progress_bar(True, 3) as advance:
        advance()
    terminal.console().print("text")


def test_files_are_written_although_nobody_reads_the_results(
    call: Call, tmp_path: Path, shipped: Any
) -> None:
    """`loopmdm solve ... --html FILE | true`"""
    board = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    words = ["solve", board, "--model", shipped("sudoku9"), "--loops", "1", "--order", "confidence"]
    command = [sys.executable, "-m", "loopmdm", *map(str, words), "--html", str(tmp_path / "page.html")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert b"Traceback" not in errors.read()
    assert process.wait(timeout=600) == 141
    assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sample", "--help"]])
def test_help_that_nobody_gets_is_no_success(words: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "loopmdm", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "error: cannot write to standard output: No space left on device" in done.stderr
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, env=environment, text=True)
    assert done.returncode == 141 and not done.stderr


def test_sources_use_the_tolerant_streams() -> None:
    """No other source writes to standard error itself, where a reader that leaves would end the work."""
    folder = Path(terminal.__file__).parent
    for path in folder.rglob("*.py"):
        text = path.read_text()
        if path.name != "terminal.py":
            assert "file=sys.stderr" not in text and "Console(stderr" not in text, path


def test_results_are_printed_although_the_page_cannot_be_written(
    call: Call, tmp_path: Path, text_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["sample", text_run, "--num", 1, "--length", 8, "--steps", 2, "--html-loops", 0]
    expected = call(*words).out
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = call(*words, "--html", tmp_path / "page.html")
    assert done.status == 1 and done.out == expected
    assert "error: --html: cannot write" in done.err and "No space left on device" in done.err
    assert not list(tmp_path.iterdir())


def test_solved_boards_have_shares_and_no_likelihood(call: Call, tmp_path: Path, shipped: Any) -> None:
    solved = "534678912672195348198342567859761423426853791713924856961537284287419635345286179\n"
    (tmp_path / "boards.txt").write_text(solved)
    words = ["eval", shipped("sudoku9"), "--puzzles", tmp_path / "boards.txt", "--loops", "1"]
    done = call(*words)
    assert done.status == 0 and done.out.count("100.0 %") == 2 and "NELBO" not in done.out
    assert "no puzzle has a blank" in done.err
    document = call(*words, "--json").json
    assert document["held_out"] == [] and [one["share_solved"] for one in document["solved"]] == [1.0, 1.0]
