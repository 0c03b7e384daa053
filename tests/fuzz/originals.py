"""Small files of every kind that the package reads, whole, and what reading one gives."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from loopmdm import ComputePlan, LoopMDM, LoopMDMConfig
from loopmdm.data.sudoku.files import read_puzzles
from loopmdm.data.text import read_documents
from loopmdm.data.tokenizer import BPETokenizer, load_tokenizer
from loopmdm.runs.run_file import RUN_FILE, RunFile
from loopmdm.train import EMA
from loopmdm.train.config import TrainConfig
from loopmdm.train.optimizers import Optimizer
from loopmdm.train.state import STATE_FILE, read_metadata, write_state
from tests.mdlm.files import averaged, diffusion, write_lightning

LINES = [f"line {number}: the quick brown fox · {'x' * (number % 7)}" for number in range(12)]
BOARD = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


class Original(NamedTuple):
    """A folder whose file `damaged` is to be damaged, and what reads the folder.

    whole: values are protected by a digest or checksums, so that what is read must be what was written.
    """

    folder: Path
    damaged: str
    read: Callable[[Path], dict[str, Tensor]]
    whole: bool = False


def _nothing_of(read: Callable[[Path], Any]) -> Callable[[Path], dict[str, Tensor]]:
    def reads(folder: Path) -> dict[str, Tensor]:
        read(folder)
        return {}

    return reads


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _from_pretrained(folder: Path) -> dict[str, Tensor]:
    return _state(LoopMDM.from_pretrained(folder))


def _from_mdlm(name: str, **options: Any) -> Callable[[Path], dict[str, Tensor]]:
    return lambda folder: _state(LoopMDM.from_mdlm(folder / name, **options))


def _training_state(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    read_metadata(folder / STATE_FILE)
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _documents(name: str) -> Callable[[Path], dict[str, Tensor]]:
    def read(folder: Path) -> dict[str, Tensor]:
        for document in read_documents(folder / name):
            assert isinstance(document, str) and document
        return {}

    return read


def _puzzles(folder: Path) -> dict[str, Tensor]:
    found = read_puzzles(folder / "puzzles")
    cells = found.spec.cells
    assert found.clues.shape == (len(found.lines), cells) and int(found.clues.max()) <= cells**0.5
    return {}


def _tokenizer(folder: Path) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("the quick brown fox")[:5].tolist())
    return {}


def _write_training_state(folder: Path) -> None:
    model = LoopMDM(_config())
    ema = EMA(model, 0.9)
    optimizer = Optimizer(ema.names, ema.parameters, TrainConfig(steps=5), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    ema.updates = 1
    counters = {"step": 1, "tokens": 10}
    metadata = {"config": {"steps": 5}, "counters": counters, "world_size": 1, "torch": "2"}
    write_state(folder / STATE_FILE, model, ema, optimizer, metadata)


def _config() -> LoopMDMConfig:
    return LoopMDMConfig(12, 11, hidden_size=8, num_heads=2, num_layers=3, cond_dim=4, max_length=20)


def _write(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


@cache
def originals() -> dict[str, Original]:
    """All kinds, made once a process; folders are deleted with it."""
    root = Path(_temporary().name)

    def folder(name: str) -> Path:
        (root / name).mkdir()
        return root / name

    torch.manual_seed(0)
    model = LoopMDM(_config())
    run = folder("run")
    model.save_pretrained(run)
    found = {
        "weights with a digest": Original(run, "model.safetensors", _from_pretrained, True),
        "config.json": Original(run, "config.json", _from_pretrained, True),
    }
    foreign = folder("foreign")
    (foreign / "config.json").write_bytes((run / "config.json").read_bytes())
    save_file(model.state_dict(), foreign / "model.safetensors")
    found["weights of another writer"] = Original(foreign, "model.safetensors", _from_pretrained)
    shards = folder("shards")
    (shards / "config.json").write_bytes((run / "config.json").read_bytes())
    names = list(model.state_dict())
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: model.state_dict()[name] for name in held}, shards / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    _write(shards, "model.safetensors.index.json", json.dumps(index).encode())
    found["index of shards"] = Original(shards, "model.safetensors.index.json", _from_pretrained, True)

    module = diffusion()
    light = folder("lightning")
    write_lightning(light / "last.ckpt", module, averaged(module))
    found["Lightning file"] = Original(light, "last.ckpt", _from_mdlm("last.ckpt"))
    plain = folder("torch")
    torch.save(module.state_dict(), plain / "model.bin")
    found["torch file"] = Original(plain, "model.bin", _from_mdlm("model.bin", num_heads=2))
    old = folder("legacy")
    torch.save(module.state_dict(), old / "model.pt", _use_new_zipfile_serialization=False)
    found["older torch file"] = Original(old, "model.pt", _from_mdlm("model.pt", num_heads=2))

    state = folder("state")
    _write_training_state(state)
    found["training state"] = Original(state, STATE_FILE, _training_state, True)
    RunFile("sudoku6", {}, TrainConfig(steps=5).to_dict()).write(state)
    found[RUN_FILE] = Original(state, RUN_FILE, _nothing_of(RunFile.read))
    ComputePlan.segments([(2, ComputePlan.adaptive(0.3, 3)), (3, 2)]).save(state / "plan.json")
    found["plan"] = Original(
        state, "plan.json", _nothing_of(lambda path: ComputePlan.load(path / "plan.json"))
    )

    text = folder("text")
    rows = [json.dumps({"text": line, "id": number}) for number, line in enumerate(LINES)]
    table = pa.table({"text": LINES, "id": list(range(len(LINES)))})
    _write(text, "corpus.txt", "\n".join(LINES).encode())
    _write(text, "corpus.jsonl", "\n".join(rows).encode())
    pq.write_table(table, text / "corpus.parquet")
    with pa.OSFile(str(text / "corpus.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for suffix in ("txt", "jsonl", "parquet", "arrow"):
        found[f"{suffix} corpus"] = Original(text, f"corpus.{suffix}", _documents(f"corpus.{suffix}"))
    for kind, body in (
        ("puzzles", "\n".join([BOARD] * 3)),
        ("puzzles with answers", f"puzzle,solution\n{BOARD},{ANSWER}\n{BOARD.replace('0', '.')},{ANSWER}\n"),
    ):
        place = folder(kind)
        _write(place, "puzzles", body.encode())
        found[kind] = Original(place, "puzzles", _puzzles)
    words = folder("tokenizer")
    BPETokenizer.train(LINES * 5, 300).save(words)
    for file in sorted(words.iterdir()):
        found[f"tokenizer's {file.name}"] = Original(words, file.name, _tokenizer)
    return found


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-files-")
