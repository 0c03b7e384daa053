"""Digests and tied tensors in safetensors files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.train.state import read_metadata
from tests.model.test_pretrained import same, small


def test_every_flipped_bit_of_weights_is_refused(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    chance = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, 64), *(chance.randrange(header) for _ in range(200))] + [
        chance.randrange(len(whole)) for _ in range(200)
    ]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=r"digest|whole safetensors"):
            LoopMDM.from_pretrained(tmp_path)
    save_file(load_file_of(whole, tmp_path), path)  # another writer: no digest
    assert same(LoopMDM.from_pretrained(tmp_path), model)


def load_file_of(data: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "copy.safetensors").write_bytes(data)
    return load_file(folder / "copy.safetensors")


def test_tied_weights_are_written_once_and_load_tied(tmp_path: Path) -> None:
    model = LoopMDM(LoopMDMConfig(40, 39, hidden_size=32, num_heads=2, num_layers=3, cond_dim=8))
    model.output_layer.linear.weight = model.vocab_embed.embedding
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "output_layer.linear.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata()["output_layer.linear.weight"] == "vocab_embed.embedding"
    loaded = LoopMDM.from_pretrained(tmp_path)
    assert loaded.output_layer.linear.weight is loaded.vocab_embed.embedding
    assert same(loaded, model)


def test_forged_counters_are_refused(tmp_path: Path) -> None:
    text = (
        '{"config": {"steps": 40}, "counters": {"step": 1000000000}, "world_size": 1, "torch": "2",'
        ' "ema_updates": 20, "adam_steps": 20}'
    )
    save_file({"x": torch.ones(1)}, tmp_path / "s", metadata={"loopmdm_training_state": text})
    with pytest.raises(ValueError, match="counters contradict"):
        read_metadata(tmp_path / "s")
