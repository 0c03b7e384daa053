"""Foreign text in messages: visible, on one line, of bounded length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.cli import main
from loopmdm.data import tables
from loopmdm.data.text import read_documents
from loopmdm.data.tokenizer import BPETokenizer, load_tokenizer
from loopmdm.printable import printable, printable_lines
from loopmdm.train.config import TrainConfig


def test_what_a_terminal_acts_on_is_made_visible() -> None:
    assert printable("a\x1b[2J\r\nb\u202ec\x9b\ud800") == r"a\x1b[2J\r\nb\u202ec\x9b\ud800"
    assert printable("plain ünïcode 文") == "plain ünïcode 文"
    assert printable("x" * 500, longest=10) == "x" * 10 + "..."
    assert printable_lines("one\ntwo\x07\n") == "one\ntwo\\x07\n"


def test_the_command_line_prints_no_escape_of_a_path(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "\x1b]0;title\x07\x1b[2J/none.ckpt", "target"]) == 1
    error = capfd.readouterr().err
    assert "\x1b" not in error and "\x07" not in error and "none.ckpt" in error


FORGED = "\x1b[2J\u202ename"


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    config = LoopMDMConfig(12, 11, hidden_size=8, num_heads=2, num_layers=3, cond_dim=4, max_length=20)
    LoopMDM(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("way", ["name", "dtype", "nan"])
def test_names_of_tensors_are_made_visible(tmp_path: Path, way: str) -> None:
    tensors = checkpoint(tmp_path)
    first = next(iter(tensors))
    tensors[FORGED] = tensors[first].clone()
    if way != "name":  # the name fits, so that what is wrong with its values is told
        del tensors[FORGED]
    if way == "dtype":
        tensors[first] = tensors[first].long()
    if way == "nan":
        tensors[first] = tensors[first] * torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        LoopMDM.from_pretrained(tmp_path)
    text = str(caught.value)
    assert "\x1b" not in text and "\u202e" not in text
    assert (r"\x1b[2J\u202ename" in text) == (way == "name")


@pytest.mark.parametrize("way", ["shard", "tensor"])
def test_names_in_an_index_of_shards_are_made_visible(tmp_path: Path, way: str) -> None:
    tensors = checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    shard_of = dict.fromkeys(tensors, "part.safetensors")
    shard_of |= {FORGED: "part.safetensors"} if way == "tensor" else {next(iter(tensors)): FORGED}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        LoopMDM.from_pretrained(tmp_path)
    assert r"\x1b[2J\u202ename" in str(caught.value) and "\x1b" not in str(caught.value)


def test_names_in_a_tokenizer_are_made_visible(tmp_path: Path) -> None:
    BPETokenizer.train(["some text"] * 5, 300).save(tmp_path)
    path = tmp_path / "loopmdm_tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), FORGED: 1}))
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert r"\x1b[2J\u202ename" in str(caught.value) and "\x1b" not in str(caught.value)


def test_bytes_that_a_reader_of_tables_quotes_are_made_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(path: Path, name: str) -> Iterator[object]:
        yield from ()
        raise OSError(f"don't know what type: {FORGED}")

    monkeypatch.setattr(tables, "_parquet", damaged)
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 10)
    with pytest.raises(ValueError, match="cannot be read as parquet") as caught:
        list(read_documents(tmp_path / "a.parquet"))
    assert r"\x1b[2J\u202ename" in str(caught.value) and "\x1b" not in str(caught.value)


def test_names_of_training_options_are_made_visible() -> None:
    with pytest.raises(ValueError, match=r"unknown training option \\x1b\[2J") as caught:
        TrainConfig.from_dict({"steps": 5, FORGED: 1})
    assert "\x1b" not in str(caught.value)
