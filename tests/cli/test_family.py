"""`loopmdm train --family`: the single runs it stands for, on the same batches, resumed by its command."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loopmdm import LoopMDM
from loopmdm.cli.family import Member, parse_members
from loopmdm.data.tokenizer import load_tokenizer
from loopmdm.quality.likelihood import evaluate_nll
from loopmdm.runs.jobs import read_corpus, text_job
from loopmdm.runs.options import UsageError
from loopmdm.runs.run_file import RunFile
from loopmdm.train import read_metrics

from .conftest import TINY, Call

SIZES = [
    *TINY[:4],
    *TINY[10:],
    "--steps",
    "3",
    "--log-every",
    "1",
    "--eval-every",
    "0",
    "--schedule",
    "constant",
]
FAMILY = ["--family", "light=1,2", "heavy=3,3"]
NAMES = ["light1", "light2", "heavy3", "heavy3-seed1"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    equal = all(torch.equal(mine[name], theirs[name]) for name in theirs)
    return mine.keys() == theirs.keys() and equal and losses(one) == losses(other)


def batches_hash(folder: Path) -> str:
    """Of the batches a run was trained on, from its run.json."""
    run = RunFile.read(folder)
    assert run is not None
    job = text_job(run, read_corpus(run), load_tokenizer(folder), None)
    digest = hashlib.blake2b()
    for step in range(job.config.steps):
        ids, _ = job.data.batch(step, batch_size=job.config.batch_size)
        digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    from loopmdm.cli import main

    folder = tmp_path_factory.mktemp("family")
    assert main(["train", *FAMILY, "--data", str(corpus), "--out", str(folder), *SIZES]) == 0
    return folder


def test_members_are_the_single_runs(call: Call, tmp_path: Path, family: Path, corpus: Path) -> None:
    for name, layers, seed in (("light2", 2, []), ("heavy3-seed1", 3, ["--seed", 1])):
        words = ["--layers", layers, "--loop", "0:1", "--max-loops", 1, *seed]
        done = call("train", "--data", corpus, *SIZES, *words, "--out", tmp_path / name)
        assert done.status == 0, done.err
        assert same(tmp_path / name, family / name)
        assert (tmp_path / name / "run.json").read_text() == (family / name / "run.json").read_text()
    config = LoopMDM.from_pretrained(family / "light1").config
    assert (config.num_layers, config.loop_start, config.loop_end, config.max_loops) == (1, 0, 1, 1)


def test_members_see_the_same_batches_in_the_same_order(family: Path) -> None:
    hashes = {name: batches_hash(family / name) for name in NAMES}
    assert hashes["light1"] == hashes["light2"] == hashes["heavy3"] != hashes["heavy3-seed1"]


def test_the_summary_measures_all_on_the_same_masks(call: Call, family: Path, corpus: Path) -> None:
    document = json.loads((family / "family.json").read_text())
    rows: dict[str, Any] = {row["name"]: row for row in document["members"]}
    assert list(rows) == NAMES and document["heavy"] == "heavy3"
    assert [row["seed"] for row in rows.values()] == [0, 0, 0, 1]
    for name, row in rows.items():
        measured = call("eval", family / name, "--loops", 1, "--json").json["held_out"][0]
        assert row["nll"] == pytest.approx(measured["nll"], rel=1e-9)
        assert row["stderr"] == pytest.approx(measured["stderr"], rel=1e-9)
        assert row["flops"] == read_metrics(family / name / "metrics.jsonl")[2]["flops"]
        if name != "heavy3":
            assert row["more_than_heavy"] == pytest.approx(row["nll"] - rows["heavy3"]["nll"], abs=1e-12)
            assert 0 < row["more_than_heavy_stderr"] < 5 * row["stderr"]
    assert "more_than_heavy" not in rows["heavy3"]


def test_the_same_command_continues(call: Call, tmp_path: Path, family: Path, corpus: Path) -> None:
    out = tmp_path / "family"
    shutil.copytree(family, out)
    words = ["train", *FAMILY, "--data", corpus, *SIZES, "--out", out]
    # As if a stop had come in the second member: it has one step, the later ones do not exist.
    for name in NAMES[1:]:
        shutil.rmtree(out / name)
    single = ["--layers", 2, "--loop", "0:1", "--max-loops", 1, "--out", out / "light2"]
    assert call("train", "--data", corpus, *SIZES, *single, "--steps", 1).status == 0
    (out / "family.json").unlink()
    untouched = (out / "light1" / "model.safetensors").stat().st_mtime_ns
    done = call(*words, "--json")
    assert done.status == 0, done.err
    assert f"{out}/light1 is trained already" in done.err and "after step 1 of 3" in done.err
    assert (out / "light1" / "model.safetensors").stat().st_mtime_ns == untouched
    assert all(same(out / name, family / name) for name in NAMES)
    assert [row["name"] for row in done.json["members"]] == NAMES
    table = call(*words).out
    assert [line.split()[0] for line in table.splitlines()[2:6]] == NAMES and "paired" in table
    other = call(*words, "--lr", 0.5)
    assert other.status == 1 and "learning_rate was 0.002, is 0.5" in other.err
    words = ["train", "--family", "light=1", "heavy=3", "--data", corpus, "--out", out]
    other = call(*words, *SIZES, "--hidden", 32)
    assert other.status == 2 and "hidden_size is 16, got 32" in other.err


def test_sudoku(call: Call, tmp_path: Path) -> None:
    words = "--preset sudoku6 --hidden 16 --heads 2 --steps 2 --batch-size 4 --eval-size 1 --log-every 1"
    done = call("train", "--family", "light=1", "heavy=2", *words.split(), "--out", tmp_path, "--json")
    assert done.status == 0, done.err
    document = done.json
    assert [row["layers"] for row in document["members"]] == [1, 2]
    assert "100 held-out 6x6 puzzles" in document["held_out"]["source"]
    measured = call("eval", tmp_path / "light1", "--loops", 1, "--order", "confidence", "--json").json
    assert document["members"][0]["nll"] == pytest.approx(measured["held_out"][0]["nll"], rel=1e-9)


def test_without_held_out_text(call: Call, tmp_path: Path, corpus: Path) -> None:
    words = ["--family", "light=1", "heavy=2", "--data", corpus, *SIZES, "--validation", 0]
    done = call("train", *words, "--steps", 1, "--out", tmp_path)
    assert done.status == 0, done.err
    assert all(line.split()[-1] == "-" for line in done.out.splitlines()[2:4])


def test_paired_difference_is_that_of_two_evaluations(family: Path) -> None:
    from loopmdm.quality.likelihood import nll_by_sequence, ratio_of_sums

    ids = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(0))
    models = [LoopMDM.from_pretrained(family / name) for name in ("light1", "heavy3")]
    sums = [nll_by_sequence(model, [ids], num_loops=1, num_t=4)[0] for model in models]
    tokens = torch.full((6,), 32.0, dtype=torch.float64)
    difference, stderr = ratio_of_sums(sums[0] - sums[1], tokens)
    nll = [evaluate_nll(model, [ids], num_loops=[1], num_t=4)[0].nll for model in models]
    assert difference == pytest.approx(nll[0] - nll[1], abs=1e-9)
    each = (sums[0] - sums[1]) / 32
    assert stderr == pytest.approx(float(each.std() / 6**0.5), rel=1e-9)


def test_words_of_a_family() -> None:
    assert parse_members(["heavy=6,6,6", "light=2,3"]) == [
        Member("heavy", 6, 0),
        Member("heavy", 6, 1),
        Member("heavy", 6, 2),
        Member("light", 2, 0),
        Member("light", 3, 0),
    ]
    assert [member.name for member in parse_members(["light=2", "heavy=6,6"])] == [
        "light2",
        "heavy6",
        "heavy6-seed1",
    ]
    for words, message in (
        (["light=2"], "no heavy model; give heavy=N"),
        (["heavy=2"], "no light model"),
        (["light=2", "heavy=3", "medium=2"], "got 'medium=2', expected light=N,... and heavy=N"),
        (["light=2", "light=3", "heavy=4"], "each once"),
        (["light", "heavy=4"], "got '' in 'light', expected counts of layers"),
        (["light=two", "heavy=4"], "got 'two' in 'light=two'"),
        (["light=2,", "heavy=4"], "got '' in 'light=2,'"),
        (["light=0", "heavy=4"], "got '0' in 'light=0'"),
        (["light=2.5", "heavy=4"], "got '2.5'"),
        (["light=2,6", "heavy=6"], "light=6 is not shallower than heavy=6"),
        (["light=2,5", "heavy=6,4"], "light=5 is not shallower than heavy=4"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_members(words)
        assert message in str(caught.value)


def test_what_does_not_go_with_a_family(call: Call, tmp_path: Path, corpus: Path) -> None:
    for words, message in (
        (
            ["--data", corpus, "--layers", 3],
            "--family sets the layers of diffusion models; leave out --layers",
        ),
        (["--data", corpus, "--autoregressive"], "leave out --autoregressive"),
        (["--data", corpus, "--loop", "0:3"], "--loop: got 0:3, expected START:END"),
        ([], "nothing to train on"),
    ):
        done = call("train", "--family", "light=1", "heavy=2", "--out", tmp_path / "out", *words)
        assert done.status == 2 and message in done.err, done.err
