"""Commands that write into a folder replace nothing that is not theirs, and refuse before they begin."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm import LoopMDM
from loopmdm.cli import family
from loopmdm.runs import jobs
from loopmdm.runs.run_file import FILES
from loopmdm.study.kit.folder import FIGURE_FILE, PLAN_FILES, TABLE_CSV, TABLE_JSON, StudyFolder
from loopmdm.train import RunFolder, read_metrics
from loopmdm_kernels.locks import LOCK_FILE, Lock, LockedError

from .conftest import STEPS, TINY, Call


def contents(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data are not even read."""

    def read(*_: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(jobs, "read_corpus", read)


@pytest.mark.parametrize("name", [name for name in FILES if name != "loopmdm_tokenizer.json"])
@pytest.mark.parametrize("how", [[], ["--resume"]])
def test_train_over_foreign_files(
    call: Call, tmp_path: Path, corpus: Path, name: str, how: list[str], untouched: None
) -> None:
    out = tmp_path / "project"
    (out / ".partial").mkdir(parents=True)
    (out / ".partial/notes.txt").write_text("mine")
    (out / name).write_text('{"my": "settings"}')
    before = contents(out)
    done = call("train", *how, "--data", corpus, "--out", out, *TINY, *STEPS)
    assert done.status in (1, 2) and done.err.count("\n") == 1 and "Traceback" not in done.err
    assert name in done.err or "holds a run already" in done.err
    assert contents(out) == before


def test_train_beside_foreign_files_of_other_names(call: Call, tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "project"
    (out / ".partial").mkdir(parents=True)
    (out / ".partial/notes.txt").write_text("mine")
    (out / "tokenizer_config.json").write_text("mine")
    assert call("train", "--data", corpus, "--out", out, *TINY, *STEPS).status == 0
    assert (out / ".partial/notes.txt").read_text() == (out / "tokenizer_config.json").read_text() == "mine"
    assert not (out / LOCK_FILE).exists()


@pytest.mark.parametrize("name", FILES)
def test_links_in_the_folder_of_a_run(call: Call, tmp_path: Path, text_run: Path, name: str) -> None:
    if not (text_run / name).exists():
        pytest.skip("a byte-level run has no such file")
    out = shutil.copytree(text_run, tmp_path / "run")
    (out / name).rename(tmp_path / "target")
    (out / name).symlink_to(tmp_path / "target")
    before = contents(tmp_path)
    done = call("train", "--resume", "--out", out, "--steps", 6)
    assert done.status == 1 and f"{name} is a link; a run writes regular files only" in done.err
    assert contents(tmp_path) == before


def test_options_that_were_wrong_can_be_mended_in_the_same_folder(
    call: Call, tmp_path: Path, corpus: Path
) -> None:
    words = ["train", "--data", corpus, "--out", tmp_path / "new/run", *TINY, *STEPS]
    failed = call(*words, "--tokenizer", "bpe:280", "--length", 100_000)
    assert failed.status == 1 and not (tmp_path / "new").exists()
    assert call(*words).status == 0


def test_a_tokenizer_left_by_a_start_that_failed(call: Call, tmp_path: Path, corpus: Path) -> None:
    """As `torchrun` may leave one: it is used if it is what the options ask for, and kept if it is not."""
    words = ["train", "--data", corpus, *TINY, *STEPS, "--tokenizer", "bpe:280", "--out"]
    assert call(*words, tmp_path / "whole").status == 0
    left = tmp_path / "left"
    left.mkdir()
    for name in ("loopmdm_tokenizer.json", "tokenizer.json"):
        shutil.copy(tmp_path / "whole" / name, left)
    before = contents(left)
    other = call("train", "--data", corpus, *TINY, *STEPS, "--tokenizer", "bpe:270", "--out", left)
    assert other.status == 1 and "holds loopmdm_tokenizer.json, tokenizer.json, which a new run" in other.err
    assert contents(left) == before
    assert call(*words, left).status == 0


def test_a_run_stopped_before_its_first_checkpoint(call: Call, tmp_path: Path, text_run: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("run.json", "loopmdm_tokenizer.json", "train_config.json", "metrics.jsonl"):
        shutil.copy(text_run / name, out)
    (out / LOCK_FILE).write_text("process 1 on nowhere since then\n")  # of a process that was killed
    run = json.loads((text_run / "run.json").read_text())
    again = call("train", "--data", run["data"], "--out", out, *TINY, *STEPS)
    assert again.status == 1 and "holds train_config.json, metrics.jsonl, run.json, which" in again.err
    assert call("train", "--resume", "--out", out).status == 0
    losses = [
        [r["loss"] for r in read_metrics(at / "metrics.jsonl") if "loss" in r] for at in (out, text_run)
    ]
    assert losses[0] == losses[1]


def test_a_second_training_in_the_folder(call: Call, tmp_path: Path, corpus: Path, untouched: None) -> None:
    out = tmp_path / "run"
    with RunFolder(out, FILES):
        before = contents(out)
        for how in ([], ["--resume"]):
            done = call("train", *how, "--data", corpus, "--out", out, *TINY, *STEPS)
            assert done.status == 1 and f"{out} is in use by process {os.getpid()} on " in done.err
        assert contents(out) == before


def test_a_family_over_a_foreign_file(call: Call, tmp_path: Path, corpus: Path, untouched: None) -> None:
    words = ["train", "--family", "light=2", "heavy=3", "--data", corpus, "--out", tmp_path]
    for content in ('{"mother": "Anna"}', "no JSON"):
        (tmp_path / family.FAMILY_FILE).write_text(content)
        done = call(*words)
        assert done.status == 1 and "family.json" in done.err
        assert contents(tmp_path) == {"family.json": content.encode()}


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "run.json", "training_state.safetensors", "metrics.jsonl"]
)
def test_convert_over_other_files(call: Call, tmp_path: Path, text_run: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    done = call("convert", tmp_path / "not even read.ckpt", tmp_path / "out")
    assert done.status == 1 and f"holds {name}, which the converted checkpoint would replace" in done.err
    assert contents(tmp_path) == {f"out/{name}": b"mine"}


def test_convert_into_the_folder_of_a_run(call: Call, tmp_path: Path, text_run: Path) -> None:
    run = shutil.copytree(text_run, tmp_path / "run")
    before = contents(run)
    torch.save(LoopMDM.from_pretrained(text_run).state_dict(), tmp_path / "mdlm.pt")
    done = call("convert", tmp_path / "mdlm.pt", run)
    assert done.status == 1 and "training_state.safetensors" in done.err and contents(run) == before


@pytest.mark.parametrize("name", [TABLE_JSON, TABLE_CSV, FIGURE_FILE, *PLAN_FILES])
def test_a_study_over_foreign_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which a new study would replace"):
        StudyFolder(tmp_path, "toy", {})
    assert contents(tmp_path) == {name: b"mine"}


def test_two_studies_in_a_folder(tmp_path: Path) -> None:
    def other(key: str) -> int:
        with pytest.raises(LockedError, match="is in use by process"):
            StudyFolder(tmp_path, "toy", {})
        return int(key)

    folder = StudyFolder(tmp_path, "toy", {}, progress=False)
    with Lock(tmp_path / LOCK_FILE, "it"), pytest.raises(LockedError):
        folder.items(["1"], int)
    assert folder.items(["1", "2"], other) == [1, 2]
    assert StudyFolder(tmp_path, "toy", {}).items(["2"], other) == [2]


def test_the_items_of_a_study_are_not_written_through_a_link(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study", "toy", {}, progress=False)
    (tmp_path / "study/items.jsonl").rename(tmp_path / "target")
    (tmp_path / "study/items.jsonl").symlink_to("../target")
    before = (tmp_path / "target").read_bytes()
    with pytest.raises(OSError, match="it is a link"):
        folder.items(["1"], int)
    assert (tmp_path / "target").read_bytes() == before
