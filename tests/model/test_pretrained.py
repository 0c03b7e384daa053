"""Folders of config.json and model.safetensors: round trips, whole-file writes, and every kind of damage."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm_kernels.files import write_files


def small(**changes: Any) -> LoopMDM:
    config = LoopMDMConfig.preset("sudoku6", hidden_size=16, num_heads=2, **changes)
    model = LoopMDM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def same(one: LoopMDM, other: LoopMDM) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(
        torch.equal(states[0][n], states[1][n]) for n in states[0]
    )


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_round_trip(tmp_path: Path, positions: str) -> None:
    model = small(positions=positions)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = LoopMDM.from_pretrained(str(tmp_path / "new" / "folder"))
    assert loaded.config == model.config and same(loaded, model) and not loaded.training
    ids = torch.randint(7, (2, 36))
    assert torch.equal(loaded(ids), model(ids))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()(ids).sum().backward()


def test_config_overrides(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    assert LoopMDM.from_pretrained(tmp_path, max_loops=24, dropout=0.5).config.max_loops == 24
    with pytest.raises(ValueError, match=r"unknown configuration fields \['loops'\]"):
        LoopMDM.from_pretrained(tmp_path, loops=3)


def test_dtypes(tmp_path: Path) -> None:
    model = small()
    model.double().save_pretrained(tmp_path / "double")
    assert same(LoopMDM.from_pretrained(tmp_path / "double"), model)
    model.bfloat16().save_pretrained(tmp_path / "half")
    loaded = LoopMDM.from_pretrained(tmp_path / "half")
    assert same(loaded, model.float())


def test_loading_draws_no_random_numbers_and_keeps_no_tie_to_the_file(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = LoopMDM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    size = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").write_bytes(b"\0" * size)
    assert same(loaded, model)


def test_names_on_disk_are_those_of_the_state_dict(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("model_type") == "loopmdm" and LoopMDMConfig.from_dict(fields) == model.config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"vocab_size": 7}', r"config\.json: missing configuration fields"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2', expected 'loopmdm'"),
        ('{"model_type": ["loopmdm"]}', r"model_type is \['loopmdm'\], expected 'loopmdm'"),
        ('{"vocab_size": 7, "mask_token_id": 6, "colour": 1}', r"unknown configuration fields \['colour'\]"),
        (
            '{"vocab_size": 7, "mask_token_id": 6, "num_layers": 1000000000}',
            "num_layers: got 1000000000, expected at most 4096",
        ),
        (
            '{"vocab_size": 7, "mask_token_id": 6, "num_layers": 4000}',
            "num_layers is 4000, but the weights are",
        ),
        ('{"vocab_size": 7, "mask_token_id": 6, "hidden_size": -16}', "hidden_size: got -16"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_config(tmp_path: Path, text: str, message: str) -> None:
    small().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        LoopMDM.from_pretrained(tmp_path)


def test_wrong_type_in_config(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "hidden_size": "16"}))
    with pytest.raises(TypeError, match=r"config\.json: hidden_size: got '16'"):
        LoopMDM.from_pretrained(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        LoopMDM.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        LoopMDM.from_pretrained(tmp_path)
    for name in ("nothing", "/no/such/folder", "a/b/c", tmp_path / "config.json"):
        with pytest.raises(FileNotFoundError, match="expected a checkpoint folder or a hub id"):
            LoopMDM.from_pretrained(name)


def test_truncated_weights(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for end in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            LoopMDM.from_pretrained(tmp_path)
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        LoopMDM.from_pretrained(tmp_path)


def test_checkpoint_of_another_width(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"tensors do not fit(.|\n)*vocab_embed\.embedding +\[7, 32\] +\[7, 16\]"
    ):
        LoopMDM.from_pretrained(tmp_path, hidden_size=32)
    with pytest.raises(ValueError, match=r"position_embed\.embedding +no such tensor +\[36, 16\]"):
        LoopMDM.from_pretrained(tmp_path, positions="rotary")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = small()
    with torch.no_grad():
        model.blocks[1].attn_out.weight[3, 2:5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn_out\.weight holds 3 values that are NaN or infinite"
    ):
        LoopMDM.from_pretrained(tmp_path)


def test_weights_of_a_wrong_kind(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["blocks.0.norm1.weight"] = tensors["blocks.0.norm1.weight"].int()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm1\.weight has dtype torch\.int32, expected a floating-point"):
        LoopMDM.from_pretrained(tmp_path)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_full_disk_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small().save_pretrained(tmp_path)
    before = snapshot(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*model\.safetensors.*No space left.*no partial file is left"
    ) as error:
        small(max_loops=3).save_pretrained(tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("limit", [0, 1000, 20_000])
def test_a_write_cut_short_by_the_system(tmp_path: Path, limit: int) -> None:
    """A real failed write: this process may not make files larger than `limit` bytes for a moment."""
    resource = pytest.importorskip("resource")
    small().save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    changed = small(max_loops=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="no partial file is left"):
            changed.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path) == before
    changed.save_pretrained(tmp_path)
    assert snapshot(tmp_path) != before


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="path: got the file"):
        small().save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="cannot write"):
        small().save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


def test_both_files_or_none(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.EIO, "broken")

    (tmp_path / "one").write_text("old")
    with pytest.raises(OSError, match=r"cannot write .*two"):
        write_files({tmp_path / "one": lambda path: path.write_text("new"), tmp_path / "two": fail})
    assert snapshot(tmp_path) == {"one": b"old"}


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = small()
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr("loopmdm.formats.hub.unreachable", lambda: None)
    monkeypatch.chdir(tmp_path)
    loaded = LoopMDM.from_pretrained("someone/some-model_1.0", revision="v2")
    assert same(loaded, model)
    assert asked == [("someone/some-model_1.0", name, "v2") for name in ("config.json", "model.safetensors")]

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"config\.json could not be fetched from the hub: no network"
    ):
        LoopMDM.from_pretrained("someone/some-model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"loopmdm-kernels\[hf\]"):
        LoopMDM.from_pretrained("someone/some-model")


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "cond_dim", "mlp_ratio"])
def test_sizes_are_compared_before_anything_of_them_is_made(tmp_path: Path, name: str) -> None:
    small().save_pretrained(tmp_path)
    for size in (10**8, 10**30):
        with pytest.raises(ValueError, match=f"{name} is {size}, but the weights have"):
            LoopMDM.from_pretrained(tmp_path, **{name: size})
