"""What a newcomer gets wrong: each slip has an answer that says what to do, and no file is lost for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from loopmdm.cli.parser import FAILED, USAGE
from tests.cli.conftest import TINY, Call

BOARD = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SAMPLE = ["--num", "1", "--length", "8"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", "", "--out", "run"],
        ["train", "--data", "a.txt", "", "--out", "run"],
        ["train", "--data", "a.txt", "--out", ""],
        ["convert", "run", ""],
        ["solve", ""],
        ["sample", ""],
        ["sample", "run", "--html", ""],
        ["study", "attention", "run", "--out", ""],
    ],
)
def test_an_empty_name_is_not_the_present_folder(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*words)
    assert done.status == USAGE and "got ''" in done.err
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_is_a_prompt(call: Call, text_run: Path) -> None:
    assert call("sample", text_run, *SAMPLE, "--prompt", "").status == 0


@pytest.mark.parametrize("option", ["--num", "--seed", "--top-k", "--steps"])
def test_a_number_that_no_tensor_counts(call: Call, option: str) -> None:
    done = call("sample", "run", option, str(2**63))
    assert (
        done.status == USAGE
        and f"argument {option}: got '{2**63}', expected an integer below 2^63" in done.err
    )


@pytest.mark.parametrize("command", [["demo"], ["sample", "run"], ["solve", BOARD]])
def test_more_threads_than_can_be_started(call: Call, command: list[str]) -> None:
    done = call(*command, "--threads", "1000000")
    assert done.status == USAGE and "--threads: got '1000000', expected an integer at most" in done.err


def test_memory_that_is_not_there(call: Call, corpus: Path, tmp_path: Path) -> None:
    words = ["train", "--data", corpus, "--out", tmp_path / "run", *TINY, "--hidden", str(2**32)]
    done = call(*words)
    assert done.status == FAILED and "error: not enough memory: " in done.err and "alloc_cpu" not in done.err


@pytest.mark.parametrize("option", ["--hidden", "--length", "--loop-embedding"])
def test_sizes_that_cannot_be_counted(call: Call, corpus: Path, tmp_path: Path, option: str) -> None:
    words = ["train", "--data", corpus, "--out", tmp_path / "run", *TINY, option, str(2**62)]
    done = call(*words)
    assert done.status == FAILED and "error: not enough memory; a smaller" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [[], ["--autoregressive"]])
def test_more_layers_than_any_model_has(call: Call, corpus: Path, tmp_path: Path, words: list[str]) -> None:
    words = ["train", "--data", corpus, "--out", tmp_path / "run", *words, "--layers", "4097"]
    done = call(*words)
    assert done.status == USAGE and "--layers: num_layers: got 4097, expected at most 4096" in done.err


def test_an_html_page_replaces_pages_only(call: Call, text_run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "puzzles.txt"
    mine.write_text(BOARD)
    done = call("sample", text_run, *SAMPLE, "--html", mine)
    assert done.status == USAGE and "choose another name" in done.err
    assert mine.read_text() == BOARD
    for page in (tmp_path / "page.html", tmp_path / "empty.html"):
        page.touch()
        for seed in ("0", "1"):
            done = call("sample", text_run, *SAMPLE, "--html", page, "--html-loops", "0", "--seed", seed)
            assert done.status == 0 and "Samples of" in page.read_text()


def test_options_that_belong_to_another(call: Call, text_run: Path, sudoku_run: Path) -> None:
    for words, option in (
        (("sample", text_run, *SAMPLE, "--html-loops", "3"), "--html-loops: it belongs to --html"),
        (("eval", text_run, "--num", "3"), "--num: "),
        (("eval", text_run, "--order", "confidence"), "--order: "),
        (("eval", sudoku_run, "--windows", "3"), "--windows: "),
        (("eval", sudoku_run, "--part", "all"), "--part: "),
    ):
        done = call(*words)
        assert done.status == USAGE and option in done.err, words


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x89PNG\r\n\x1a\n\xff", "no text"),
        (b"", "no JSON"),
        (b'{"segments": []}', "it has no 'reading'"),
        (b"[1]", "list indices"),
    ],
)
def test_a_file_that_is_no_plan(call: Call, text_run: Path, tmp_path: Path, content: bytes, why: str) -> None:
    plan = tmp_path / "plan"
    plan.write_bytes(content)
    done = call("sample", text_run, *SAMPLE, "--plan", plan)
    assert done.status == USAGE and f"{plan}: not a plan written by ComputePlan.to_json: {why}" in done.err
    assert "Error(" not in done.err and "codec" not in done.err


def test_a_command_to_copy_is_quoted(call: Call, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    words = ["train", "--data", corpus, "--out", out, *TINY, "--steps", "1"]
    assert f"loopmdm sample '{out}'\n" in call(*words).out


def test_training_says_what_it_does_not_do(call: Call, corpus: Path, tmp_path: Path) -> None:
    words = ["train", "--data", corpus, *TINY, "--steps", "1"]
    done = call(*words, "--out", tmp_path / "a", "--validation", "0")
    assert done.status == 0 and "nothing was held out" in done.err
    done = call(*words, "--out", tmp_path / "b", "--tokenizer", "bpe:99999")
    assert done.status == 0 and "pairs for a vocabulary of " in done.err and "not 99,999" in done.err


def test_a_folder_that_is_a_file(call: Call, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    done = call("train", "--data", corpus, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert done.status == FAILED and f"--cache: {tmp_path / 'cache'} is a file" in done.err
    assert not (tmp_path / "run").exists()
    done = call("study", "attention", "run", "--out", tmp_path / "cache")
    assert done.status == FAILED and f"--out: {tmp_path / 'cache'} is a file" in done.err


def test_more_loops_than_any_model_has(call: Call, text_run: Path, tmp_path: Path) -> None:
    done = call("convert", text_run, tmp_path / "out", "--max-loops", "999999")
    assert done.status == USAGE and "--max-loops: got '999999', expected an integer at most 1024" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "0"], "--plan: loops must be at least 1, got 0"),
        (["--plan", "5000"], "--plan: loops must be in 1..1024, got 5000"),
        (["--plan", "0", "--adaptive", "0.1"], "--plan: loops must be at least 1, got 0"),
        (["--loops", "1025"], "--loops: loops must be in 1..1024, got 1025"),
        (["--loops=S0:4"], "--loops: loops of 'S0:4' must be at least 1, got 0"),
        (["--loops", "1025", "--adaptive", "0.1"], "--loops: loops must be in 1..1024, got 1025"),
        (["--plan", "L2,H2", "--light", "0", "--heavy", "1"], "--light: loops must be at least 1, got 0"),
        (["--prompt", "a" * 8], "--prompt: it is 9 tokens long, beyond the 8 of a sample"),
        (["--prompt", "a\udced"], "--prompt: text holds the lone surrogate '\\udced' at index 1"),
        (["--infill", "a\udced___"], "--infill: text holds the lone surrogate '\\udced' at index 1"),
    ],
)
def test_what_a_sample_cannot_have(call: Call, text_run: Path, words: list[str], message: str) -> None:
    done = call("sample", text_run, *SAMPLE, *words)
    assert done.status == USAGE and f"error: {message} (see" in done.err


def test_blocks_that_no_model_has(call: Call, text_run: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train = ["train", "--out", out, "--loop", "1:9"]
    for words in (
        ["convert", text_run, out, "--loop", "1:9"],
        [*train, "--data", corpus],
        [*train, "--preset", "sudoku6"],
        [*train, "--data", corpus, "--init-from", text_run],
    ):
        done = call(*words)
        assert done.status == USAGE, done.err
        assert "error: --loop: got 1:9, expected START:END with 0 <= START < END <= " in done.err
        assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["train", "--out", "other", "--cache", "data/tokens"], "--cache"),
        (["train", "--out", "data/run", "--stream"], "--out"),
        (["train", "--family", "light=1", "heavy=2", "--out", "data/family"], "--out"),
        (["data", "build", "--out", "data/corpus"], "--out"),
        (["study", "attention", "run", "--out", "data/study"], "--out"),
        (["study", "isoflop", "--preset", "text", "--out", "data/study"], "--out"),
    ],
)
@pytest.mark.parametrize("data", ["data", "d*a/**", "data/*"])
def test_nothing_is_written_below_the_data(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], option: str, data: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/a.txt").write_text("a text\n")
    done = call(*words, "--data", data)
    assert done.status == USAGE and f"error: {option}: data/" in done.err
    assert "is among the files of --data" in done.err
    assert sorted(map(str, Path().rglob("*"))) == ["data", "data/a.txt"]


def test_what_is_not_read_may_be_written_to(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/a.txt").write_text("a text\n" * 200)
    small = [*TINY[:8], "--length", "16", "--batch-size", "2", "--steps", "1"]
    assert call("train", "--data", "data", "--cache", "data/.tokens", "--out", "a", *small).status == 0
    assert call("train", "--data", "data/*.txt", "--cache", "data/tokens", "--out", "b", *small).status == 0
    assert call("data", "build", "--data", "data/*.txt", "--validation", "0", "--out", "data/c").status == 0


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_data_is_not_written_among(call: Call, tmp_path: Path, option: str) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    (data / "a.txt").write_text("a text\n")
    (tmp_path / "link").symlink_to(data)
    rest = [] if option == "--out" else ["--out", other]
    done = call("train", "--data", data, option, tmp_path / "link", *rest, *TINY, "--steps", "1")
    assert done.status == USAGE and f"{option}: {data} is the folder of --data; choose another" in done.err
    assert [path.name for path in data.iterdir()] == ["a.txt"] and not other.exists()


def test_puzzles_from_a_pipe(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: Callable[[str], Path]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(BOARD,))
    writer.start()
    try:
        done = call("solve", pipe, "--model", shipped("sudoku9"), "--loops", "1", "--order", "confidence")
    finally:
        writer.join()
    assert done.status == 0 and f"{pipe} is a pipe: waiting" in done.err and "1 puzzles of 9x9" in done.out


@pytest.mark.parametrize(
    "command", [["sample"], ["eval"], ["solve", BOARD, "--model"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize("value", ["0:9", "5:2", "-1:2", "1:2:3", "1:nan"])
def test_blocks_that_are_not_there(
    call: Call, text_run: Path, sudoku_run: Path, command: list[str], value: str
) -> None:
    done = call(*command, sudoku_run if "solve" in command else text_run, f"--loop={value}")
    assert done.status == USAGE and "--loop: got " in done.err and value in done.err
    assert "loop_start" not in done.err and "expected START:END" in done.err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "5:2", "99999999999999999999", ",", "/nope/x"])
def test_a_plan_that_is_none(call: Call, text_run: Path, value: str) -> None:
    done = call("sample", text_run, *SAMPLE, f"--plan={value}")
    assert done.status == USAGE and "error: --plan: " in done.err


@pytest.mark.parametrize(
    ("command", "name"),
    [(["sample"], "MODEL"), (["eval"], "MODEL"), (["solve", BOARD, "--model"], "--model")],
)
def test_a_model_that_is_not_there(call: Call, tmp_path: Path, command: list[str], name: str) -> None:
    for model in (tmp_path / "nothing", "nothing"):
        done = call(*command, model)
        assert done.status == FAILED and f"error: {name}: path_or_hub_id: got '{model}'" in done.err


def test_files_of_samples_that_cannot_be_measured(call: Call, text_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    for content, message in (
        (
            '{"generated_seqs": ["ab", "a\\ud800"]}',
            "text 1: text holds the lone surrogate '\\ud800' at index 1",
        ),
        ('{"generated_seqs": ["ab"]}', "holds one sample, expected at least 2"),
    ):
        file.write_text(content)
        done = call("eval", text_run, "--from-samples", file)
        assert done.status == FAILED and f"{file}" in done.err and message in done.err
