"""`loopmdm train`: what a run leaves behind, resuming, and everything that can be asked wrongly."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loopmdm import LoopMDM, sample
from loopmdm.data.text import read_documents
from loopmdm.data.tokenizer import load_tokenizer
from loopmdm.runs.jobs import sudoku_job
from loopmdm.runs.recipes import SUDOKU_RECIPES, TEXT_RECIPES
from loopmdm.runs.run_file import RunFile
from loopmdm.runs.text_data import located
from loopmdm.train import read_metrics

from .conftest import STEPS, TINY, Call

TIMINGS = ("seconds", "cpu_seconds", "tokens_per_second", "flops_per_second", "peak_memory")


def history(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def test_a_text_run_leaves_a_model_with_its_tokenizer(text_run: Path, corpus: Path) -> None:
    model = LoopMDM.from_pretrained(text_run)
    assert (model.config.hidden_size, model.config.num_layers, model.config.max_loops) == (16, 3, 2)
    assert (model.config.loop_start, model.config.loop_end, model.config.max_length) == (1, 2, 32)
    assert load_tokenizer(text_run).vocab_size == model.config.vocab_size == 258
    run = json.loads((text_run / "run.json").read_text())
    assert run["data"] == str(corpus) and run["preset"] == "text" and run["length"] == 32
    assert run["training"] == json.loads((text_run / "train_config.json").read_text())
    assert run["training"]["steps"] == 4 and run["training"]["learning_rate"] == 2e-3
    records = history(text_run)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    evaluations = {r["step"]: r["evaluation"]["held_out"] for r in records if "evaluation" in r}
    assert list(evaluations) == [2, 4]
    for result in evaluations[4]:
        assert 4 < result["nll"] < 7 and result["num_sequences"] == 2
        assert result["perplexity"] == pytest.approx(torch.tensor(result["nll"]).double().exp().item())
    assert [r["num_loops"] for r in evaluations[4]] == [1, 2]
    assert (text_run / "loss.png").stat().st_size > 1000


def test_samples_are_drawn_at_each_evaluation(
    call: Call, tmp_path: Path, text_run: Path, corpus: Path
) -> None:
    """Those of the averaged weights, for each S; a run does not depend on whether they are drawn."""
    drawn = [r["evaluation"]["samples"] for r in history(text_run) if "evaluation" in r]
    assert len(drawn) == 2
    assert [(one["num_loops"], one["seed"], one["prompt"]) for one in drawn[1]] == 2 * [(1, 0, "")] + 2 * [
        (2, 0, "")
    ]
    model, tokenizer = LoopMDM.from_pretrained(text_run), load_tokenizer(text_run)
    tokens = sample(model, 2, 32, 32, plan=2, seed=0, progress=False).tokens
    assert [one["text"] for one in drawn[1][2:]] == [tokenizer.decode(row) for row in tokens]

    out, words = tmp_path / "without", ["--data", corpus, *TINY, *STEPS, "--samples", 0]
    assert call("train", *words, "--out", out).status == 0
    losses, weights = (
        [[r for r in history(at) if "loss" in r] for at in (out, text_run)],
        [load_file(at / "model.safetensors") for at in (out, text_run)],
    )
    assert losses[0] == losses[1] and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[1])
    assert not any("samples" in r.get("evaluation", {}) for r in history(out))
    resumed = call(
        "train", "--resume", "--out", out, "--steps", 5, "--samples", 1, "--sample-prompts", "Text", "12"
    )
    assert resumed.status == 0, resumed.err
    last = history(out)[-1]["evaluation"]["samples"]
    assert [(one["num_loops"], one["prompt"]) for one in last] == [
        (1, "Text"),
        (1, "12"),
        (2, "Text"),
        (2, "12"),
    ]
    long = call("train", *words[:-2], "--out", tmp_path / "long", "--sample-prompts", 31 * "x")
    assert long.status == 2 and "has 32 tokens with BOS, but a sequence has 32" in long.err


def test_several_sources_and_what_is_said_of_their_files(call: Call, tmp_path: Path, corpus: Path) -> None:
    """The same run as from the folder; run.json keeps the sources, and eval finds them again."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more/bin").write_bytes(b"\0")
    for index in (1, 2):
        (tmp_path / f"more/{index}.jsonl").write_text('{"text": "' + f"document {index} " * 9 + '"}\n')
    files = sorted(map(str, corpus.iterdir()))
    words = [*TINY, "--steps", 1, "--validation", 0.2]
    done = call(
        "train",
        "--data",
        *files[:3],
        f"{corpus}/*.txt",
        "--data",
        tmp_path / "more",
        "--out",
        tmp_path / "run",
        *words,
    )
    assert done.status == 0, done.err
    said = done.err.splitlines()
    assert (
        said[0]
        == f"read: 32 file(s) of {files[0]}, {files[1]}, {files[2]}, and 2 more: 2 JSON lines, 30 text"
    )
    assert said[1].startswith("left out: 3 more name(s) of files that are read (")
    assert said[2] == "left out: 1 binary file(s) (bin)"
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["data"] == [*files[:3], f"{corpus}/*.txt", str(tmp_path / "more")]
    evaluated = call("eval", tmp_path / "run", "--loops", 1, "--num-t", 1, "--windows", 2, "--json")
    assert evaluated.status == 0 and evaluated.json["part"] == "validation"
    assert evaluated.json["data"] == run["data"]
    words = ["--loops", 1, "--num-t", 1, "--json"]
    for several in (["--data", *files[:2]], ["--data", files[0], "--data", files[1]]):
        other = call("eval", tmp_path / "run", *several, *words)
        assert other.json["data"] == files[:2] and other.json["part"] == "all"
        assert f"read: 2 file(s) of {files[0]}, {files[1]}: 2 text" in other.err
    one = call("eval", "--data", tmp_path / "more", tmp_path / "run", *words)
    assert one.status == 0 and one.json["data"] == str(tmp_path / "more")
    assert call("eval", tmp_path / "run", "more", *words).status == 2
    wrong = call("eval", "--data", "more", tmp_path / "run", "--no-such-option")
    assert wrong.status == 2 and "unrecognized arguments: --no-such-option" in wrong.err
    resumed = call("train", "--resume", "--out", tmp_path / "run", "--steps", 2)
    assert resumed.status == 0, resumed.err


def test_a_run_may_stand_among_its_data(call: Call, tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    assert call("train", "--data", folder, "--out", folder / "run", *TINY, "--steps", 1).status == 0
    resumed = call("train", "--resume", "--out", folder / "run", "--steps", 2)
    assert resumed.status == 0 and "left out: 1 folder(s) of runs and corpora (run)" in resumed.err
    evaluated = call("eval", folder / "run", "--loops", 1, "--num-t", 1, "--windows", 1)
    assert evaluated.status == 0, evaluated.err


def test_a_pipe_is_waited_for_and_said(call: Call, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"words of a pipe\n" * 400)
    os.close(writer)
    done = call("train", "--data", f"/dev/fd/{reader}", "--out", tmp_path / "run", *TINY, "--steps", 1)
    os.close(reader)
    assert done.status == 0, done.err
    assert done.err.startswith(
        f"/dev/fd/{reader} is a pipe: waiting for what is written to it\nread: 1 file(s)"
    )


def test_sources_do_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "odd [name]"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    monkeypatch.chdir(folder)
    places = located(["a.txt", "*.txt", "stdlib"])
    assert places[0] == str(folder / "a.txt") and places[2] == "stdlib"
    monkeypatch.chdir(tmp_path)
    assert list(read_documents(places[1])) == ["a"]
    assert located("x") == str(tmp_path / "x") and located("stdlib") == "stdlib"


def test_a_sudoku_run_is_evaluated_by_solving(sudoku_run: Path) -> None:
    assert LoopMDM.from_pretrained(sudoku_run).config.max_length == 36
    solved = history(sudoku_run)[-1]["evaluation"]["solved"]
    cases = [(s["order"], s["num_loops"]) for s in solved]
    assert cases == [(order, loops) for order in ("left_to_right", "confidence") for loops in (1, 3, 6)]
    assert all(s["puzzles"] == 2 and s["loops"] == s["num_loops"] * s["network_calls"] for s in solved)
    samples = history(sudoku_run)[-1]["evaluation"]["samples"]
    assert [one["num_loops"] for one in samples] == [1, 1, 3, 3, 6, 6]
    for one in samples:
        assert len(one["prompt"]) == 36 and "." in one["prompt"] and set(one["text"]) <= set("123456")
    share = sum(one["solved"] for one in samples[:2]) / 2
    assert share == solved[0]["share_solved"]


def test_resumed_run_is_the_uninterrupted_one(call: Call, tmp_path: Path, corpus: Path) -> None:
    half = tmp_path / "half"
    first = call(
        "train", "--data", corpus, "--out", half, *TINY, *STEPS, "--schedule", "constant", "--steps", 2
    )
    assert first.status == 0
    done = call("train", "--resume", "--out", half, "--steps", 4, "--json")
    assert done.status == 0 and "after step 2 of 4" in done.err
    whole = tmp_path / "whole"
    assert (
        call("train", "--data", corpus, "--out", whole, *TINY, *STEPS, "--schedule", "constant").status == 0
    )
    without_end = [r for r in history(half) if "loss" in r]
    assert without_end == [r for r in history(whole) if "loss" in r] and len(without_end) == 4
    mine, theirs = (load_file(at / "model.safetensors") for at in (half, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    document = done.json
    assert (
        document["last_loss"] == without_end[-1]["loss"] and document["first_loss"] == without_end[0]["loss"]
    )
    assert document["tokens"] == 4 * 4 * 32 and document["steps"] == 4 and document["out"] == str(half)
    assert document["evaluation"] == history(half)[-1]["evaluation"]


def test_resume_where_nothing_is_starts_the_run(
    call: Call, tmp_path: Path, corpus: Path, text_run: Path
) -> None:
    done = call("train", "--resume", "--data", corpus, "--out", tmp_path / "run", *TINY, *STEPS)
    assert done.status == 0 and "after step 0 of 4" in done.err
    assert history(tmp_path / "run") == history(text_run)


def test_bpe_without_validation(call: Call, tmp_path: Path, corpus: Path) -> None:
    words = ["--tokenizer", "bpe:280", "--validation", 0, "--steps", 1, "--loop-law", "fixed:2"]
    done = call("train", "--data", corpus, "--out", tmp_path / "run", *TINY, *words, "--json")
    assert done.status == 0, done.err
    assert done.json["evaluation"] == {}
    assert load_tokenizer(tmp_path / "run").vocab_size == 280
    assert LoopMDM.from_pretrained(tmp_path / "run").config.mask_token_id == 279


def test_options_reach_the_configuration(call: Call, tmp_path: Path, corpus: Path) -> None:
    words = (
        "--steps 1 --lr 0.5 --warmup 7 --schedule cosine --decay 0.4 --weight-decay 0.1 --clip 0 --ema 0.5"
        " --seed 9 --accumulation 2 --precision bf16 --loop-law poisson --recompute --checkpoint-every 3"
        " --checkpoint-minutes 2 --log-every 1 --dropout 0.2 --eval-every 0"
    )
    out = tmp_path / "run"
    assert call("train", "--data", corpus, "--out", out, *TINY, *words.split()).status == 0
    config = json.loads((out / "train_config.json").read_text())
    expected = {
        "learning_rate": 0.5,
        "warmup_steps": 7,
        "schedule": "cosine",
        "decay_fraction": 0.4,
        "weight_decay": 0.1,
        "clip": None,
        "ema": 0.5,
        "seed": 9,
        "accumulation": 2,
        "precision": "bf16",
        "loop_law": "poisson",
        "recompute": True,
        "checkpoint_every": 3,
        "checkpoint_minutes": 2,
        "eval_every": 0,
    }
    assert {name: config[name] for name in expected} == expected
    assert LoopMDM.from_pretrained(out).config.dropout == 0.2


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["--preset", "huge"], 2, "invalid choice: 'huge' (choose from"),
        ([], 2, "nothing to train on: give --data PATH"),
        (["--preset", "small"], 2, "nothing to train on"),
        (
            ["--preset", "sudoku6", "--data", "x"],
            2,
            "--preset sudoku6 makes its own data and does not take --data",
        ),
        (["--preset", "sudoku6", "--clues", "7:4"], 2, "--clues: got '7:4', expected minimal, full or LO:HI"),
        (["--preset", "sudoku6", "--clues", "all"], 2, "with 8 <= LO <= HI <= 36"),
        (["--data", "CORPUS", "--clues", "none"], 2, "--preset text is about text; leave out --clues"),
        (["--preset", "sudoku6", "--sample-prompts", "x"], 2, "samples boards; leave out --sample-prompts"),
        (["--data", "CORPUS", "--autoregressive", "--samples", "1"], 2, "leave out --samples"),
        (["--data", "CORPUS", "--samples", "0", "--sample-prompts", "x"], 2, "--samples 0 draws none"),
        (["--data", "./no/there"], 1, "there' does not exist; accepted: a file, a folder or 'stdlib'"),
        (["--data", "CORPUS", "--steps", "0"], 2, "--steps: got '0', expected an integer of at least 1"),
        (["--data", "CORPUS", "--steps", "many"], 2, "--steps: got 'many'"),
        (["--data", "CORPUS", "--lr", "0"], 2, "--lr: got 0, expected a number above 0"),
        (["--data", "CORPUS", "--lr", "nan"], 2, "--lr: got 'nan'"),
        (["--data", "CORPUS", "--ema", "1.5"], 2, "--ema: ema must be in [0, 1] and finite, got 1.5"),
        (["--data", "CORPUS", "--heads", "5"], 2, "--heads: hidden_size: got 64, expected a multiple of"),
        (["--data", "CORPUS", "--hidden", "10"], 2, "--hidden: hidden_size: got 10, expected a multiple of"),
        (["--data", "CORPUS", "--loop", "2:9"], 2, "--loop: got 2:9, expected START:END"),
        (["--data", "CORPUS", "--loop", "2"], 2, "--loop: got '2', expected START:END"),
        (["--data", "CORPUS", "--max-loops", "0"], 2, "--max-loops: got '0'"),
        (["--data", "CORPUS", "--validation", "1"], 2, "--validation: got 1.0"),
        (["--data", "CORPUS", "--length", "2"], 1, "error: --length: the training part of the data ("),
        (["--data", "CORPUS", "--length", "100000"], 1, "give more text or a smaller length"),
        (["--data", "CORPUS", "--tokenizer", "bpe:x"], 2, "expected bpe:VOCAB"),
        (
            ["--data", "CORPUS", "--tokenizer", "bpe:9"],
            1,
            "--tokenizer: vocab_size is 9; accepted: at least 258",
        ),
        (["--data", "CORPUS", "--tokenizer", "./nothere"], 1, "--tokenizer: source './nothere' is no"),
        (
            ["--data", "CORPUS", "--loop-law", "fixed:0"],
            2,
            "--loop-law: S of the loop law 'fixed:0' must be at least 1",
        ),
        (["--preset", "sudoku6", "--loop-law", "fixed:0"], 2, "--loop-law: S of the loop law 'fixed:0' must"),
        (["--data", "CORPUS", "--loop-law", "odd"], 2, "--loop-law: loop law is 'odd'; accepted: 'uniform'"),
        (["--data", "CORPUS", "--device", "tpu"], 2, "--device: got 'tpu', expected cpu, cuda or cuda:N"),
        (["--data", "CORPUS", "--device", "cuda:99"], 1, "--device cuda:99: torch finds"),
        (["--resume"], 1, "holds no run; give --preset or --data"),
    ],
)
def test_bad_input(
    call: Call, tmp_path: Path, corpus: Path, words: list[str], status: int, message: str
) -> None:
    done = call("train", "--out", tmp_path / "run", *(str(corpus) if w == "CORPUS" else w for w in words))
    assert done.status == status, done.err
    assert message in done.err and done.out == "" and "Traceback" not in done.err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("clues, given", [("none", (0, 0)), ("20:22", (18, 22))])
def test_clues_of_training_boards(call: Call, tmp_path: Path, clues: str, given: tuple[int, int]) -> None:
    small = ["--hidden", "16", "--heads", "2", "--steps", "1", "--batch-size", "8", "--eval-size", "1"]
    words = ["--preset", "sudoku6", "--clues", clues, *small, "--out", tmp_path / "run"]
    assert call("train", *words).status == 0
    stored = RunFile.read(tmp_path / "run")
    assert stored is not None and stored.clues == clues
    prompt = sudoku_job(stored, 1).data.batch(0)[1].sum(1)
    assert given[0] <= prompt.min() and prompt.max() <= given[1]
    other = call("train", "--resume", "--clues", "9:9", "--out", tmp_path / "run")
    assert other.status == 2 and f"clues is {clues!r}, got '9:9'" in other.err


def test_a_folder_that_cannot_be_written(call: Call, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "file", "is a file, expected a folder"),
        (tmp_path / "file" / "run", "Not a dir"),
    ):
        done = call("train", "--data", corpus, "--out", out, *TINY)
        assert done.status == 1 and message in done.err and done.err.count("\n") == 1


def test_runs_are_not_mixed_up(call: Call, tmp_path: Path, corpus: Path, text_run: Path) -> None:
    before = (text_run / "training_state.safetensors").read_bytes()
    again = call("train", "--data", corpus, "--out", text_run, *TINY)
    assert again.status == 2 and "holds a run already: continue it with --resume" in again.err
    other = call("train", "--resume", "--out", text_run, "--length", 64)
    assert other.status == 2 and "length is 32, got 64" in other.err
    other = call("train", "--resume", "--out", text_run, "--hidden", 64)
    assert other.status == 2 and "hidden_size is 16, got 64" in other.err
    other = call("train", "--resume", "--out", text_run, "--lr", 0.5)
    assert other.status == 1 and "learning_rate was 0.002, is 0.5" in other.err
    assert (text_run / "training_state.safetensors").read_bytes() == before


def test_changed_text_is_noticed(call: Call, tmp_path: Path, corpus: Path, text_run: Path) -> None:
    data = shutil.copytree(corpus, tmp_path / "corpus")
    out = tmp_path / "run"
    assert call("train", "--data", data, "--out", out, *TINY, "--steps", 1).status == 0
    (data / "00.txt").write_text("something else " * 50)
    done = call("train", "--resume", "--out", out, "--steps", 2)
    assert done.status == 1 and "is not what this run began with" in done.err


def test_damaged_files_of_a_run(call: Call, tmp_path: Path, text_run: Path) -> None:
    for name, message in (
        ("training_state.safetensors", "damaged or is no safetensors file"),
        ("run.json", "is not valid JSON"),
        ("loopmdm_tokenizer.json", "the tokenizer in"),
    ):
        folder = shutil.copytree(text_run, tmp_path / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        done = call("train", "--resume", "--out", folder, "--steps", 5)
        assert done.status == 1 and message in done.err and "Traceback" not in done.err


def test_without_matplotlib(
    call: Call, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = call("train", "--data", corpus, "--out", tmp_path / "run", *TINY, "--steps", 1, "--json")
    assert done.status == 0 and "matplotlib is not installed" in done.err
    assert done.json["plot"] is None and not (tmp_path / "run" / "loss.png").exists()


def test_help_names_the_presets(call: Call) -> None:
    out = call("train", "--help").out
    assert all(name in out for name in (*SUDOKU_RECIPES, *TEXT_RECIPES))
