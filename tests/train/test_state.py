"""A damaged training state is refused, one without a digest (of an earlier version) is said to be so."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toy_training import ToyModel, batches

from loopmdm.formats.safetensors_files import DIGEST_KEY
from loopmdm.train import TrainConfig, Trainer
from loopmdm.train.state import STATE_FILE

CONFIG: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "checkpoint_every": 3,
    "seed": 3,
}


def trainer(folder: Path, **changes: Any) -> Trainer:
    config = TrainConfig(**(CONFIG | changes))
    return Trainer(ToyModel(), batches, config, folder, lambda _: None, show_progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).train()
    return (folder / STATE_FILE).read_bytes()


def test_no_flipped_bit_is_trained_on(tmp_path: Path, whole: bytes) -> None:
    """Anywhere in the file, and everywhere in its first bytes and its header."""
    chance = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(16), *(chance.randrange(header) for _ in range(250))]
    places += [chance.randrange(len(whole)) for _ in range(250)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / STATE_FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or is no safetensors file"):
            trainer(tmp_path).resume()
    for length in (0, 7, 8, header - 1, header, len(whole) - 1):
        (tmp_path / STATE_FILE).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged or is no safetensors file"):
            trainer(tmp_path).resume()
    (tmp_path / STATE_FILE).write_bytes(whole)
    assert trainer(tmp_path).resume() == 6


def without_digest(path: Path, whole: bytes, **changes: str) -> dict[str, torch.Tensor]:
    """As an earlier version wrote it."""
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {key: value for key, value in file.metadata().items() if key != DIGEST_KEY}
    save_file(tensors, path, metadata=metadata | changes)
    return tensors


def test_a_state_without_a_digest_loads_and_is_named(tmp_path: Path, whole: bytes) -> None:
    tensors = without_digest(tmp_path / STATE_FILE, whole)
    resumed = trainer(tmp_path)
    with pytest.warns(UserWarning, match=rf"{STATE_FILE} states no digest"):
        assert resumed.resume() == 6
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, tensors[f"model.{name}"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "metadata are no JSON"),
        ("[" * 100_000, "metadata are no JSON"),
        ("[1]", "not those of a training state"),
        (json.dumps({"step": 1}), "not those of a training state"),
    ],
    ids=["cut", "deep", "list", "other fields"],
)
def test_other_metadata_are_refused(tmp_path: Path, whole: bytes, header: str, message: str) -> None:
    without_digest(tmp_path / STATE_FILE, whole, loopmdm_training_state=header)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).resume()
