"""Names in a file that a terminal would act on, or that stand for more than the file holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.runs.run_file import RunFile
from loopmdm.train import TrainConfig

# Clears the screen; the same as one character; turns the direction of writing; begins another line.
ESCAPES = "\x1b[2J\x9b2J\u202e\rok"


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LoopMDM(LoopMDMConfig.preset("sudoku6", hidden_size=16, num_heads=2)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(LoopMDM.from_pretrained(folder).state_dict())


def extra(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {ESCAPES: torch.ones(1)}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name + ESCAPES: tensor for name, tensor in tensors.items()}


def long(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"x" * 1_000_000: torch.ones(1)}


def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {ESCAPES: torch.ones(1), "module." + ESCAPES: torch.ones(1)}


def fails(call: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        call()
    text = str(error.value)
    assert printable(text) and len(text) < 10_000, repr(text[:1000])
    return text


@pytest.mark.parametrize("change", [extra, renamed, long, twice])
def test_names_of_tensors(folder: Path, change: Callable[..., dict[str, torch.Tensor]]) -> None:
    tensors = change(weights(folder))
    save_file(tensors, folder / "model.safetensors")
    torch.save(tensors, folder / "bare.pt")
    torch.save({"state_dict": {f"backbone.{n}": t for n, t in tensors.items()}}, folder / "lightning.ckpt")
    fails(lambda: LoopMDM.from_pretrained(folder))
    fails(lambda: LoopMDM.from_mdlm(folder))
    fails(lambda: LoopMDM.from_mdlm(folder / "bare.pt"))
    fails(lambda: LoopMDM.from_mdlm(folder / "lightning.ckpt", ema=False))
    fails(lambda: LoopMDM.from_mdlm(tensors))


@pytest.mark.parametrize(
    "shards",
    [{ESCAPES: 3}, {ESCAPES: "../x"}, {"a": ESCAPES}, {ESCAPES: "shard.safetensors"}, {"a": "x" * 100_000}],
)
def test_names_in_an_index(folder: Path, shards: dict[str, Any]) -> None:
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    fails(lambda: LoopMDM.from_pretrained(folder))


@pytest.mark.parametrize("change", [{ESCAPES: 1}, {"model_type": ESCAPES}, {"hidden_size": ESCAPES}])
def test_names_in_configurations(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    fails(lambda: LoopMDM.from_pretrained(folder))
    (folder / "run.json").write_text(json.dumps({"preset": "text", "model": {}, "training": {}} | change))
    fails(lambda: RunFile.read(folder))
    fails(lambda: TrainConfig.from_dict({"steps": 1} | change))


@pytest.mark.parametrize("number", ["99", "1000000000", "9" * 5000])
def test_a_name_does_not_make_blocks(folder: Path, number: str) -> None:
    tensors = weights(folder) | {f"blocks.{number}.norm1.weight": torch.ones(16)}
    assert "tensors in all" in fails(lambda: LoopMDM.from_mdlm(tensors))
    save_file(tensors, folder / "model.safetensors")
    assert "tensors in all" in fails(lambda: LoopMDM.from_mdlm(folder))


_PEAK = """
import resource, sys
from loopmdm import LoopMDM
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
LoopMDM.from_pretrained(sys.argv[1])
before = peak()
for folder in sys.argv[2:]:
    try:
        LoopMDM.from_pretrained(folder)
        raise SystemExit(f"{folder} loads")
    except (ValueError, TypeError):
        pass
print(peak() - before)
"""


def test_stated_sizes_take_no_memory(folder: Path, tmp_path: Path) -> None:
    """Whatever config.json states is compared with the file before anything of that size exists."""
    config = json.loads((folder / "config.json").read_text())
    names = ("hidden_size", "vocab_size", "num_layers", "num_heads", "cond_dim", "mlp_ratio", "max_length")
    folders = []
    for name in names:
        for size in (4096, 10**5, 10**8, 10**12, 2**63, 1e8, 1e300):
            copy = shutil.copytree(folder, tmp_path / f"{name}-{size}")
            heads = {"num_heads": 1} if name == "hidden_size" else {}
            (copy / "config.json").write_text(json.dumps(config | heads | {name: size}))
            folders.append(str(copy))
    command = [sys.executable, "-c", _PEAK, str(folder), *folders]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64  # MiB; one matrix of the smallest width here would be 64
