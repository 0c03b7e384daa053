"""Checkpoints in several files: an index names the shard of each tensor, as transformers writes them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from torch import Tensor

from loopmdm.formats import safetensors_files
from loopmdm.formats.folders import WEIGHTS_FILE, locate, read_json
from loopmdm.formats.pickles import StoredTensor
from loopmdm.formats.torch_files import TorchFile
from loopmdm.printable import printable

_LONGEST_NAME = 255  # of a file, in characters
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def find_index(folder: Path) -> str | None:
    """The name of a local folder's index; None where its weights are in one file, or there are none."""
    if (folder / WEIGHTS_FILE).is_file():
        return None
    return next((name for name in INDEX_FILES if (folder / name).is_file()), None)


def read_shards(folder: str | os.PathLike[str], index: str, revision: str | None = None) -> dict[str, Tensor]:
    """All tensors that the index `index` of a folder or hub id names, from their shards.

    Raises:
        FileNotFoundError: shards are missing; all of them are named.
        ValueError: a damaged index, a tensor that its shard lacks, or one that the index does not know.
    """
    path = locate(folder, index, revision)
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{path}: has no weight_map, which names the shard of each tensor")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard or len(shard) > _LONGEST_NAME:
            got = printable(f"the shard of {name} is {shard!r}")
            raise ValueError(f"{path}: {got}, expected a file beside the index")
    shards = sorted(set(shard_of.values()))
    if Path(folder).is_dir():
        missing = [shard for shard in shards if not (Path(folder) / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path}: of {len(shards)} shards, missing are {printable(', '.join(missing))}"
            )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        held = _read_shard(locate(folder, shard, revision))
        stated = {name for name, file in shard_of.items() if file == shard}
        if set(held) != stated:
            differing = ", ".join(sorted(set(held) ^ stated)[:5])
            raise ValueError(
                f"{path}: {printable(shard)} and the index differ about the tensors {printable(differing)}"
            )
        tensors.update(held)
    return tensors


def _read_shard(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors_files.read(path)
    with contextlib.closing(TorchFile(path)) as file:
        root = file.root
        if not isinstance(root, dict) or not all(isinstance(leaf, StoredTensor) for leaf in root.values()):
            raise ValueError(f"{path}: expected a state dict of tensors")
        return {str(name): file.tensor(leaf) for name, leaf in root.items()}
