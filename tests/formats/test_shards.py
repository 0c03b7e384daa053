"""Folders whose weights are in several files, with an index."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from loopmdm import LoopMDM, LoopMDMConfig

CONFIG = LoopMDMConfig(
    vocab_size=40, mask_token_id=39, hidden_size=32, num_heads=2, num_layers=3, cond_dim=8, max_length=16
)


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request, tmp_path):
    """A folder of two shards, its index file and the model in it."""
    torch.manual_seed(0)
    model = LoopMDM(CONFIG)
    state = model.state_dict()
    names = list(state)
    stem, index = {
        "safetensors": ("model", "model.safetensors.index.json"),
        "bin": ("pytorch_model", "pytorch_model.bin.index.json"),
    }[request.param]
    shards = {
        f"{stem}-0000{i}-of-00002.{request.param}": part for i, part in ((1, names[:20]), (2, names[20:]))
    }
    for file, part in shards.items():
        tensors = {name: state[name].contiguous() for name in part}
        if request.param == "bin":
            torch.save(tensors, tmp_path / file)
        else:
            save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path, tmp_path / index, model


def rewrite(index, change):
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def test_all_forms_load(sharded):
    folder, index, model = sharded
    (folder / "config.json").write_text(json.dumps({"model_type": "loopmdm", **CONFIG.to_dict()}))
    loaded = [LoopMDM.from_pretrained(folder)]
    (folder / "config.json").unlink()
    loaded += [
        LoopMDM.from_mdlm(folder),
        LoopMDM.from_mdlm(index),
        LoopMDM.from_pretrained(folder, config=CONFIG),
    ]
    for other in loaded:
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_missing_shards_are_named(sharded):
    folder = sharded[0]
    missing = [file for file in folder.iterdir() if "-of-" in file.name]
    for file in missing:
        file.unlink()
    with pytest.raises(FileNotFoundError, match="of 2 shards, missing are") as error:
        LoopMDM.from_mdlm(folder)
    assert all(file.name in str(error.value) for file in missing)


def test_an_index_that_does_not_fit(sharded):
    folder, index, _ = sharded
    whole = index.read_text()
    rewrite(index, lambda content: content["weight_map"].pop("output_layer.linear.weight"))
    with pytest.raises(ValueError, match=r"differ about the tensors output_layer\.linear\.weight"):
        LoopMDM.from_mdlm(folder)
    index.write_text(whole)
    first = next(iter(json.loads(whole)["weight_map"].values()))
    rewrite(index, lambda content: content["weight_map"].update(extra=first))
    with pytest.raises(ValueError, match="differ about the tensors extra"):
        LoopMDM.from_mdlm(folder)
    for path in ("../model.safetensors", "/etc/passwd", 3):
        index.write_text(whole)
        rewrite(index, lambda content, path=path: content["weight_map"].update(extra=path))
        with pytest.raises(ValueError, match=r"the shard of extra is .* expected a file"):
            LoopMDM.from_mdlm(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        LoopMDM.from_mdlm(folder)
