"""`loopmdm data`, and runs on what it has built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loopmdm.runs.run_file import RunFile
from loopmdm.train import read_metrics

from .conftest import STEPS, TINY, Call


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of documents, a and b."""
    folder = tmp_path_factory.mktemp("texts")
    for name, word in (("a", "apple"), ("b", "berry")):
        (folder / name).mkdir()
        lines = [json.dumps({"text": f"{word} {number} " * 20}) for number in range(60)]
        (folder / name / "one.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_build_show_train_and_eval(call: Call, tmp_path: Path, texts: Path) -> None:
    built = call(
        "data", "build", "--data", texts / "a", "--out", tmp_path / "a", "--validation", "0.2", "--json"
    )
    assert built.status == 0, built.err
    train, held_out = built.json["train"], built.json["validation"]
    assert train["documents"] + held_out["documents"] == 60 and held_out["documents"] > 3
    assert train["tokens"] == train["text_bytes"] + train["documents"]  # a byte a token, and EOS
    shown = call("data", "show", tmp_path / "a", "--check")
    assert shown.status == 0 and f"{train['tokens']:,}" in shown.out and "checksum" in shown.err
    trained = call("train", "--data", tmp_path / "a", *TINY, *STEPS, "--out", tmp_path / "run")
    assert trained.status == 0, trained.err
    sequences = train["tokens"] // 30
    assert f"{sequences:,} sequences of 32 tokens; 4 steps read 16: every sequence comes" in trained.err
    assert len([r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]) == 4
    measured = call("eval", tmp_path / "run", "--windows", "4", "--json")
    assert measured.status == 0, measured.err
    assert measured.json["held_out"][0]["num_sequences"] == 4


def test_a_mixture_by_weight_and_its_resumption(call: Call, tmp_path: Path, texts: Path) -> None:
    for name in "ab":
        assert (
            call(
                "data", "build", "--data", texts / name, "--out", tmp_path / name, "--validation", "0"
            ).status
            == 0
        )
    mixed = ["--data", tmp_path / "a", tmp_path / "b", "--weights", "3", "1"]
    trained = call("train", *mixed, *TINY, "--steps", "4", "--log-every", "1", "--out", tmp_path / "run")
    assert trained.status == 0, trained.err
    assert "nothing was held out" in trained.err
    run = RunFile.read(tmp_path / "run")
    assert run is not None and run.weights == [3, 1]
    other = call("train", "--resume", "--out", tmp_path / "run", "--weights", "1", "1")
    assert other.status == 2 and "weights is [3.0, 1.0], got [1.0, 1.0]" in other.err
    # Another corpus under the same name is not what the run began with.
    (tmp_path / "a").rename(tmp_path / "old")
    assert (
        call("data", "build", "--data", texts / "b", "--out", tmp_path / "a", "--validation", "0").status == 0
    )
    changed = call("train", "--resume", "--out", tmp_path / "run")
    assert changed.status == 1 and "is not what this run began with" in changed.err


def test_text_is_tokenised_while_it_is_trained_on(call: Call, tmp_path: Path, texts: Path) -> None:
    options = ["--data", texts / "a", "--stream", "--validation", "0.2", *TINY, "--log-every", "1"]
    whole = call("train", *options, "--steps", "6", "--out", tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert "reading: 1 file(s)" in whole.err
    assert call("data", "show", tmp_path / "whole" / "corpus", "--check").status == 0
    assert call("train", *options, "--steps", "4", "--out", tmp_path / "run").status == 0
    # Tokenising goes on where it was, and is not done again: here the corpus is finished, its source gone.
    resumed = call("train", "--resume", "--steps", "6", "--out", tmp_path / "run")
    assert resumed.status == 0, resumed.err
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    measured = call("eval", tmp_path / "run", "--windows", "4", "--json")
    assert measured.status == 0, measured.err
    assert measured.json["held_out"][0]["num_sequences"] == 4


def test_responses_to_prompts_are_learned(call: Call, tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{n}+1", "answer": str(n + 1)}) for n in range(200)]
    lines.append(json.dumps({"question": "long " * 20, "answer": "x"}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--data", tmp_path / "a.jsonl", "--validation", "0.2", *TINY, "--log-every", "1"]
    options += ["--pairs", "question", "answer"]
    whole = call("train", *options, "--steps", "6", "--out", tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert "1 of " in whole.err and "left out, the prompt is too long for 32 tokens" in whole.err
    assert call("train", *options, "--steps", "4", "--out", tmp_path / "run").status == 0
    assert call("train", "--resume", "--steps", "6", "--out", tmp_path / "run").status == 0
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    measured = call("eval", tmp_path / "run", "--windows", "4", "--json")
    assert measured.status == 0, measured.err
    held_out = measured.json["held_out"][0]
    assert held_out["num_sequences"] == 4 and held_out["num_tokens"] <= 4 * 5  # responses and EOS alone


def test_what_does_not_go_with_pairs(call: Call, tmp_path: Path, texts: Path) -> None:
    assert call("data", "build", "--data", texts / "a", "--out", tmp_path / "a").status == 0
    train = ["train", "--out", tmp_path / "run", "--data"]
    for words, message in (
        ([texts / "a", "--pairs", "one"], "got 1 field(s)"),
        ([texts / "a", "--pairs", "--stream"], "leave out --stream"),
        ([texts / "a", "--pairs", "--text-field", "x"], "leave out --text-field"),
        ([tmp_path / "a", "--pairs"], "leave out --pairs"),
    ):
        refused = call(*train, *words)
        assert refused.status == 2 and message in refused.err, refused.err
    refused = call(*train, texts / "a", "--pairs")
    assert refused.status == 1 and "no field 'prompt'" in refused.err


def test_what_does_not_go_with_a_stream(call: Call, tmp_path: Path, texts: Path) -> None:
    assert call("data", "build", "--data", texts / "a", "--out", tmp_path / "a").status == 0
    train = ["train", "--stream", "--out", tmp_path / "run"]
    for words, message in (
        (["--data", tmp_path / "a"], "leave out --stream"),
        (["--data", texts / "a", "--cache", tmp_path], "leave out --cache"),
        (["--data", texts / "a", "--weights", "1"], "--weights: they are those of corpora"),
        (["--preset", "sudoku6"], "makes its own data and does not take --stream"),
    ):
        refused = call(*train, *words)
        assert refused.status == 2 and message in refused.err, refused.err
    (texts / "bad.jsonl").write_text('{"text": "good"}\n{"word": "bad"}\n')
    refused = call(*train, "--data", texts / "bad.jsonl")
    assert refused.status == 1 and "bad.jsonl, line 2: no field 'text'" in refused.err


def test_what_does_not_go_with_corpora(call: Call, tmp_path: Path, texts: Path) -> None:
    assert call("data", "build", "--data", texts / "a", "--out", tmp_path / "a").status == 0
    train = ["train", "--out", tmp_path / "run", "--data", tmp_path / "a"]
    for words, message in (
        (["--tokenizer", "byte"], "leave out --tokenizer"),
        (["--validation", "0.1", "--text-field", "x"], "leave out --text-field, --validation"),
        (["--weights", "1", "2"], "got 2 for 1 corpora"),
        ([texts / "b"], "is a corpus and"),
    ):
        outcome = call(*train, *words)
        assert outcome.status == 2 and message in outcome.err, outcome.err
    text = call("train", "--out", tmp_path / "run", "--data", texts / "a", "--weights", "1")
    assert text.status == 2 and "those of corpora" in text.err
    again = call("data", "build", "--data", texts / "a", "--out", tmp_path / "a")
    assert again.status == 1 and "holds a finished corpus" in again.err
    nothing = call("data", "show", texts / "a")
    assert nothing.status == 1 and "holds no corpus" in nothing.err
    bad = call("data", "build", "--data", texts / "a", "--out", tmp_path / "c", "--validation", "1")
    assert bad.status == 2 and "validation is 1" in bad.err
    bpe = call(
        "data", "build", "--data", texts / "a", "--out", tmp_path / "c", "--tokenizer", "bpe:300", "--json"
    )
    assert bpe.status == 0 and bpe.json["vocab_size"] <= 300
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_put_right_before_the_first_shard(call: Call, tmp_path: Path, texts: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("not json\n")
    words = ["data", "build", "--workers", "1", "--out", tmp_path / "corpus"]
    assert call(*words, "--data", tmp_path / "bad.jsonl").status == 1
    done = call(*words, "--data", texts / "a", "--tokenizer", "bpe:260", "--json")
    assert done.status == 0 and 258 < done.json["vocab_size"] <= 260, done.err


def test_a_tokenizer_is_trained_beside_empty_files(call: Call, tmp_path: Path, texts: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "empty.txt").touch()
    build = ["data", "build", "--data", folder, "--tokenizer", "bpe:300", "--out"]
    nothing = call(*build, tmp_path / "a")
    assert nothing.status == 1 and f"no text in {folder}: every document is empty" in nothing.err
    shutil.copytree(texts / "a", folder / "some")
    built = call(*build, tmp_path / "a", "--json")
    assert built.status == 0 and built.json["train"]["documents"] > 0
